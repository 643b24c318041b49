"""PyTorch's streams, graphs, threads and modes."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flashcore
from reference import Case, assert_correct

BIG = Case(batch=2, heads=8, heads_kv=8, seq_q=700, seq_k=700, dim=64, is_causal=True)


def test_many_threads(place: tuple[str, torch.dtype]) -> None:
    cases = [Case(seq_q=20 + i, seq_k=50 - i, dim=8 * i, is_causal=i % 2 == 0) for i in range(1, 9)]
    inputs = [case.tensors(*place) for case in cases]
    alone = [flashcore.attention(*x, **case.options) for x, case in zip(inputs, cases, strict=True)]

    def different(first: int) -> list[int]:
        order = [(first + step) % len(cases) for step in range(40)]
        return [i for i in order if not torch.equal(flashcore.attention(*inputs[i], **cases[i].options), alone[i])]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(different, range(6))) == [[]] * 6


def test_the_gil_is_released_on_the_cpu() -> None:
    inputs = Case(batch=4, heads=8, heads_kv=8, seq_q=1024, seq_k=1024, dim=64).tensors("cpu", torch.float32)
    ticks = 0
    done = threading.Event()

    def work() -> None:
        flashcore.attention(*inputs)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(1e-4):
        ticks += 1
    thread.join()
    assert ticks > 3


def test_deterministic_mode_and_default_dtype_do_not_matter() -> None:
    inputs = Case().tensors("cpu", torch.float16)
    expected = flashcore.attention(*inputs)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(flashcore.attention(*inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


def test_memory_does_not_grow() -> None:
    x = torch.randn(1, 2, 8, 16)

    def calls(count: int) -> None:
        for _ in range(count):
            flashcore.attention(x, x, x, return_lse=True)
            with pytest.raises(flashcore.InvalidArgumentError):
                flashcore.attention(x, x, x, out=x)

    calls(2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(20000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096, "KiB"


def test_work_goes_to_the_current_stream(cuda: str) -> None:
    """A call is queued behind slow work on the same stream, and sees what that work wrote."""
    query, key, value = BIG.tensors(cuda, torch.float16)
    expected = flashcore.attention(query, key, value, **BIG.options)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
        late = torch.zeros_like(query)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(query)
            out = flashcore.attention(late, key, value, **BIG.options)
            assert not stream.query(), "the call does not wait for the device"
            copy = out.clone()
        stream.synchronize()
        assert torch.equal(copy, expected)


def test_two_streams_at_once(cuda: str) -> None:
    inputs = [Case(seq_q=300 + i, seq_k=400, dim=64).tensors(cuda, torch.bfloat16) for i in range(8)]
    alone = [flashcore.attention(*x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [None] * len(inputs)
    for _ in range(20):
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                results[i] = flashcore.attention(*x)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))


def test_cuda_graphs(cuda: str) -> None:
    case = Case(batch=3, heads=6, heads_kv=2, seq_q=77, seq_k=145, dim=72, is_causal=True)
    query, key, value = case.tensors(cuda, torch.float16)
    flashcore.attention(query, key, value, **case.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashcore.attention(query, key, value, return_lse=True, **case.options)
    for seed in range(3):
        generator = torch.Generator(cuda).manual_seed(seed)
        query.normal_(generator=generator)
        value.normal_(generator=generator)
        graph.replay()
        torch.cuda.synchronize()
        assert_correct(case, (query, key, value), out, lse)
        assert torch.equal(out, flashcore.attention(query, key, value, **case.options))


CAPTURE_FIRST = """
import torch, flashcore

query = torch.randn(1, 2, 64, 64, dtype=torch.float16, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flashcore.attention(query, query, query)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, flashcore.attention(query, query, query))
"""


def test_a_capture_may_be_the_first_call(cuda: str) -> None:
    """Opening the device and loading the kernel are legal while the stream is captured."""
    done = subprocess.run([sys.executable, "-c", CAPTURE_FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_reuse_follows_the_stream(cuda: str) -> None:
    """Inputs dropped right after the call are reused by the allocator only behind it."""
    query, key, value = BIG.tensors(cuda, torch.float16)
    expected = flashcore.attention(query, key, value, **BIG.options)
    for _ in range(50):
        out = flashcore.attention(query.clone(), key.clone(), value.clone(), **BIG.options)
        torch.full_like(query, float("nan"))
        assert torch.equal(out, expected)


def test_the_current_device_does_not_matter(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    inputs = BIG.tensors("cuda:1", torch.float16)
    with torch.cuda.device(0):
        out = flashcore.attention(*inputs, **BIG.options)
        assert torch.cuda.current_device() == 0
    assert_correct(BIG, inputs, out)


def test_devices_and_the_cpu_agree(cuda: str) -> None:
    inputs = BIG.tensors("cpu", torch.float16)
    there = flashcore.attention(*(x.to(cuda) for x in inputs), **BIG.options).cpu()
    torch.testing.assert_close(there, flashcore.attention(*inputs, **BIG.options), rtol=2e-3, atol=2e-3)


@pytest.mark.memory
def test_more_than_two_to_the_31_elements(cuda: str) -> None:
    """The last head lies beyond what 32 bits can count."""
    batch, heads, seq, dim = 33, 16, 32768, 128
    needed = 4 * batch * heads * seq * dim * 2
    free, _ = torch.cuda.mem_get_info()
    if free < needed * 1.1:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    query = torch.zeros(batch, heads, seq, dim, dtype=torch.float16, device=cuda)
    assert query.numel() > 2**31
    key, value = torch.zeros_like(query), torch.zeros_like(query)
    generator = torch.Generator(cuda).manual_seed(0)
    for x in (query, key, value):
        x[-1, -1].normal_(generator=generator)
    out = flashcore.attention(query, key, value, window=(64, 0))
    last = tuple(x[-1:, -1:] for x in (query, key, value))
    assert torch.equal(out[-1:, -1:], flashcore.attention(*last, window=(64, 0)))
    assert not out[:-1].any()
    rows = slice(seq - 300, seq)
    tail = tuple(x[:, :, rows].contiguous() for x in last)
    expected = flashcore.attention(*tail, window=(64, 0))
    torch.testing.assert_close(out[-1:, -1:, -200:], expected[:, :, -200:], rtol=2e-3, atol=2e-3)
