"""The emulator of Gluon: what it computes, and what it must not let pass."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import emulator
from kernels.emulator import Deadlock, KernelError, Race, Tensor, scalar

# out = x x^T: a warp loads x, a warpgroup multiplies and stores.
SOURCE = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
)


@gluon.aggregate
class Tiles:
    x: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    ROWS: gl.constexpr

    @gluon.jit
    def matrix(self):
        return self.x.index(0).reshape([self.ROWS, self.ROWS])


@gluon.jit
def _load(x, tiles, full):
    mbarrier.expect(full.index(0), x.block_type.nbytes)
    tma.async_load(x, [0, 0, 0, 0], full.index(0), tiles.x.index(0))


@gluon.jit
def _multiply(out, tiles, full):
    mbarrier.wait(full.index(0), 0)
    x = tiles.matrix()
    acc = gl.zeros([tiles.ROWS, tiles.ROWS], gl.float32)
    acc = warpgroup_mma(x, x.permute([1, 0]), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    tiles.out.index(0).reshape([tiles.ROWS, tiles.ROWS]).store(acc.to(gl.float16))
    fence_async_shared()
    tma.async_store(out, [0, 0, 0, 0], tiles.out.index(0))
    tma.store_wait(0)


@gluon.jit
def kernel(x, out):
    ROWS: gl.constexpr = x.block_type.shape[2]
    x_tile = gl.allocate_shared_memory(x.dtype, [1] + x.block_type.shape, x.layout)
    out_tile = gl.allocate_shared_memory(out.dtype, [1] + out.block_type.shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    fence_async_shared()
    tiles = Tiles(x_tile, out_tile, ROWS)
    gl.warp_specialize([(_multiply, (out, tiles, full)), (_load, (x, tiles, full))], [1], [24])
"""


def edited(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


def run(source: str = SOURCE, seed: int = 0, rows: int = 13, out_columns: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """x (rows, 16) and the kernel's x x^T, in tiles of 16."""
    x = np.random.default_rng(seed).integers(-4, 5, (1, 1, rows, 16)).astype(np.float32)
    out = np.full((1, 1, rows, rows), np.nan, np.float32)
    blocks = ((x, (1, 1, 16, 16)), (out, (1, 1, 16, out_columns)))
    arguments = [emulator.Descriptor(array, block, emulator.FLOAT16) for array, block in blocks]
    emulator.launch(emulator.load(source)["kernel"], 1, arguments, seed=seed)
    return x[0, 0], out[0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_correct_kernel_passes_under_every_schedule(seed: int) -> None:
    x, out = run(seed=seed)
    np.testing.assert_array_equal(out, x @ x.T)


@pytest.mark.parametrize("seed", range(6))
def test_slices_and_registers_multiply_like_the_whole(seed: int) -> None:
    parts = """
    y = x.slice(0, 5, 1)
    acc = warpgroup_mma(y.load(None), y.permute([1, 0]), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma(x.slice(5, 11, 1), x.permute([1, 0]).slice(5, 11), acc, is_async=True)
"""
    x, out = run(edited("    acc = warpgroup_mma(x, x.permute([1, 0]), acc, is_async=True)\n", parts), seed)
    np.testing.assert_array_equal(out, x @ x.T)


UNORDERED = "is not ordered after|before anything was written"

# The output goes through shared memory in two halves, one after the other in the same place.
HALVES = """
    left, right = acc.to(gl.float16).reshape([16, 2, 8]).permute([0, 2, 1]).split()
    half = tiles.out.index(0)
    half.reshape([16, 8]).store(left)
    fence_async_shared()
    tma.async_store(out, [0, 0, 0, 0], half)
    tma.store_wait(0)
    gl.barrier()
    half.reshape([16, 8]).store(right)
    fence_async_shared()
    tma.async_store(out, [0, 0, 0, 8], half)
"""


def halves(old: str, new: str) -> str:
    whole = SOURCE[SOURCE.index("    tiles.out.index(0).reshape") : SOURCE.index("    tma.store_wait(0)\n")]
    source = edited(whole, HALVES)
    assert source.count(old) == 1
    return source.replace(old, new)


@pytest.mark.parametrize("rows", [5, 8, 13, 16])
def test_a_tile_is_stored_by_columns(rows: int) -> None:
    for seed in range(6):
        x, out = run(halves("half =", "half ="), seed, rows, out_columns=8)
        np.testing.assert_array_equal(out, x @ x.T)


WRONG_HALVES: dict[str, tuple[type[Exception], str, str, str]] = {
    "no wait between them": (Race, UNORDERED, "    tma.store_wait(0)\n    gl.barrier()\n", ""),
    "no barrier after the wait": (Race, UNORDERED, "    gl.barrier()\n", ""),
    "the same columns": (KernelError, "stored twice", "0, 8], half", "0, 0], half"),
    "columns of both": (KernelError, "stored twice", "0, 8], half", "0, 7], half"),
    "columns before the first": (KernelError, "no such .* column", "0, 8], half", "0, -1], half"),
    "a row less": (KernelError, "a box of", "0, 8], half", "0, 8], half.slice(0, 15, 2)"),
}


@pytest.mark.parametrize("name", WRONG_HALVES)
def test_wrong_halves_fail_under_every_schedule(name: str) -> None:
    error, message, old, new = WRONG_HALVES[name]
    for seed in range(6):
        with pytest.raises(error, match=message):
            run(halves(old, new), seed, out_columns=8)


@pytest.mark.parametrize("phase", [0, 1])
def test_a_wait_in_assembly_is_a_wait(phase: int) -> None:
    asm = "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }"
    source = edited(WAIT, f'    gl.inline_asm("{asm}", "r,r", [full.index(0), {phase}])\n')
    for seed in range(6):
        if phase == 0:
            x, out = run(source, seed)
            np.testing.assert_array_equal(out, x @ x.T)
        else:
            with pytest.raises(KernelError):
                run(source, seed)


WAIT = "    mbarrier.wait(full.index(0), 0)\n"
LOAD = "    tma.async_load(x, [0, 0, 0, 0], full.index(0), tiles.x.index(0))\n"
INIT = "    mbarrier.init(full.index(0), count=1)\n"
STORE_WAIT = "    tma.store_wait(0)\n"
# What is wrong: the error and its message, the edit.
WRONG: dict[str, tuple[type[Exception], str, str, str]] = {
    "no wait": (Race, UNORDERED, WAIT, ""),
    "wait for the phase before": (KernelError, UNORDERED + "|nobody can move", WAIT, WAIT.replace("0)\n", "1)\n")),
    "fewer bytes": (Race, UNORDERED, "x.block_type.nbytes)", "x.block_type.nbytes // 2)"),
    "more bytes": (Deadlock, "_multiply.* wait for phase 0", "x.block_type.nbytes)", "x.block_type.nbytes + 16)"),
    "no load": (Deadlock, "_multiply.* wait for phase 0", LOAD, ""),
    "two arrivals": (KernelError, "arrives 2 times", LOAD, "    mbarrier.arrive(full.index(0), count=2)\n" + LOAD),
    "no initialisation": (KernelError, "before its initialisation", INIT, ""),
    "two initialisations": (KernelError, "initialised twice", INIT, INIT + INIT),
    "a phase that does not end": (
        KernelError,
        "middle of a phase",
        STORE_WAIT,
        STORE_WAIT + "    mbarrier.expect(full.index(0), 2)\n",
    ),
    "no fence after the initialisation": (Race, "initialisation", "    fence_async_shared()\n    tiles", "    tiles"),
    "no fence after the store": (Race, "no fence_async_shared", "    fence_async_shared()\n    tma", "    tma"),
    "no wait for the store": (KernelError, "while a TMA store reads", STORE_WAIT, ""),
    "no wait for the product": (KernelError, "used while it is in flight", "num_outstanding=0", "num_outstanding=1"),
    "a product nobody waits for": (
        KernelError,
        "ends with a matrix product in flight",
        STORE_WAIT,
        STORE_WAIT + "    warpgroup_mma(x, x, acc, is_async=True)\n",
    ),
    "branch on a tensor": (KernelError, "depends on a tensor", "acc.to(gl.float16))", "acc if acc > 0 else x)"),
    "other sizes": (
        KernelError,
        r"a product of \[16, 16\] and \[8, 16\]",
        "x.permute([1, 0]), acc",
        "x.slice(0, 8, 0), acc",
    ),
    "no such columns": (KernelError, "a slice of 16 from 8 of 16", "x.permute([1, 0]), acc", "x.slice(8, 16, 1), acc"),
    "load before the wait": (Race, UNORDERED, WAIT, "    tiles.matrix().load(None)\n" + WAIT),
    "no such tile": (KernelError, "index 1 of 1", "tiles.x.index(0))", "tiles.x.index(1))"),
    "no such head": (KernelError, "no such batch", "tma.async_load(x, [0, 0, 0, 0]", "tma.async_load(x, [0, 1, 0, 0]"),
    "Triton's barrier": (KernelError, "Triton", WAIT, WAIT + '    gl.inline_asm("bar.sync 1, 128;")\n'),
    "alone at a barrier": (Deadlock, "bar.sync 9", WAIT, WAIT + '    gl.inline_asm("bar.sync 9, 256;")\n'),
    "unawaited at a barrier": (KernelError, "arrived", WAIT, WAIT + '    gl.inline_asm("bar.arrive 9, 256;")\n'),
    "crowd at a barrier": (KernelError, "too many", WAIT, WAIT + '    gl.inline_asm("bar.arrive 9, 64;")\n'),
    "registers": (KernelError, "registers", "[24]", "[20]"),
    "unknown instruction": (NotImplementedError, "cp.async", WAIT, WAIT + '    gl.inline_asm("cp.async;")\n'),
    "for ever": (Deadlock, "no end", WAIT, "    while True:\n    " + WAIT),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails_under_every_schedule(name: str) -> None:
    error, message, old, new = WRONG[name]
    for seed in range(6):
        with pytest.raises(error, match=message):
            run(edited(old, new), seed)


def test_a_failure_reproduces_and_says_how() -> None:
    def failure(seed: int) -> str:
        with pytest.raises(Race) as caught:
            run(edited(WAIT, ""), seed)
        return "\n".join([str(caught.value), *caught.value.__notes__])

    failures = [failure(seed) for seed in range(8)]
    assert failures == [failure(seed) for seed in range(8)]
    assert len(set(failures)) == len(failures)
    assert "seed 3, CTA 0 of 1" in failures[3]


def test_a_deadlock_names_everybody_who_waits() -> None:
    source = edited(LOAD, LOAD + "    mbarrier.wait(full.index(0), 1)\n    mbarrier.wait(full.index(0), 0)\n")
    source = source.replace("x.block_type.nbytes", "1")
    with pytest.raises(Deadlock, match=r"_multiply\[0\].*_load\[1\]: wait for phase 0"):
        run(source)


def test_tiles_end_with_the_tensor() -> None:
    x = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    descriptor = emulator.Descriptor(x.copy(), (1, 1, 4, 8), emulator.FLOAT16)
    tile = descriptor.read([1, 2, 3, 0])
    np.testing.assert_array_equal(tile[0, 0, :2, :4], x[1, 2, 3:])
    assert not tile[0, 0, 2:].any() and not tile[..., 4:].any()
    assert not descriptor.read([1, 2, 8, 0]).any()
    np.testing.assert_array_equal(descriptor.read([0, 0, -2, 0])[0, 0, 2:, :4], x[0, 0, :2])
    descriptor.write([1, 2, 3, 0], tile + 1)
    descriptor.write([1, 2, 8, 0], tile)
    np.testing.assert_array_equal(descriptor.array[1, 2, 3:], x[1, 2, 3:] + 1)
    np.testing.assert_array_equal(descriptor.array[:, :2], x[:, :2])
    with pytest.raises(KernelError, match="twice"):
        descriptor.write([1, 2, 4, 0], tile)


def test_tiles_begin_at_any_column() -> None:
    x = np.arange(5 * 7, dtype=np.float32).reshape(1, 1, 5, 7)
    descriptor = emulator.Descriptor(np.zeros_like(x), (1, 1, 4, 4), emulator.FLOAT16)
    for column in (0, 4, 8):
        for row in (0, 4):
            tile = emulator.Descriptor(x, (1, 1, 4, 4), emulator.FLOAT16).read([0, 0, row, column])
            assert np.count_nonzero(tile) == np.count_nonzero(x[0, 0, row : row + 4, column : column + 4])
            descriptor.write([0, 0, row, column], tile)
    np.testing.assert_array_equal(descriptor.array, x)
    assert descriptor.written.all()
    for column, message in ((6, "twice"), (-1, "no such")):
        with pytest.raises(KernelError, match=message):
            descriptor.write([0, 0, 0, column], tile)


def test_pointers_know_their_bounds() -> None:
    array = np.zeros(8, np.float32)
    rows = Tensor(np.arange(4, dtype=np.int32))
    (emulator.Pointer(array) + 2 + rows).store(Tensor(np.ones(4)), rows < 3)
    np.testing.assert_array_equal(array, [0, 0, 1, 1, 1, 0, 0, 0])
    for offset, message in ((5, "out of bounds"), (-1, "out of bounds")):
        with pytest.raises(KernelError, match=message):
            (emulator.Pointer(array) + offset + rows).store(Tensor(np.ones(4)), None)
    pointer = emulator.Pointer(array)
    pointer.store(scalar(1.0), None)
    with pytest.raises(KernelError, match="twice"):
        pointer.store(scalar(1.0), None)
    with pytest.raises(KernelError, match="null"):
        emulator.Pointer(None).store(scalar(1.0), None)
    assert emulator.Pointer(None).to(emulator.INT64) == 0 and emulator.Pointer(array).to(emulator.INT64) != 0


@pytest.mark.parametrize(
    ("x", "y", "quotient", "rest"), [(7, 2, 3, 1), (-7, 2, -3, -1), (7, -2, -3, 1), (-8, 2, -4, 0)]
)
def test_integers_divide_like_c(x: int, y: int, quotient: int, rest: int) -> None:
    assert int(scalar(x) // y) == int(x // scalar(y)) == quotient
    assert int(scalar(x) % y) == int(x % scalar(y)) == rest


def test_integers_without_a_sign() -> None:
    x, y = (scalar(n).to(emulator.UINT32) for n in (-7, 3))
    assert int(x // y) == (2**32 - 7) // 3 and int((y // y).to(emulator.INT32)) == 1
    assert (x // y).value.dtype == np.uint32 and (x // y).to(emulator.INT32).value.dtype == np.int32
    assert int(scalar(-7) >> 1) == -4 and int(x >> 1) == 2**31 - 4
    with pytest.raises(KernelError, match="with a sign"):
        x // scalar(3)
    with pytest.raises(KernelError, match="division by zero"):
        x // scalar(0).to(emulator.UINT32)


def test_join_and_split_are_inverse() -> None:
    language = emulator.load("from triton.experimental.gluon import language as gl")["gl"]
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    left, right = Tensor(x).reshape([3, 2, 4]).permute([0, 2, 1]).split()
    np.testing.assert_array_equal(left.value, x[:, :4])
    np.testing.assert_array_equal(right.value, x[:, 4:])
    joined = language.join(left, right)
    assert joined.shape == [3, 4, 2]
    np.testing.assert_array_equal(joined.permute([0, 2, 1]).reshape([3, 8]).value, x)
    zeros = language.zeros_like(left)
    assert zeros.shape == [3, 4] and zeros.value.dtype == np.float32 and not zeros.value.any()
    with pytest.raises(KernelError, match="not of size 2"):
        left.split()
    with pytest.raises(KernelError, match="joins"):
        language.join(left, right.reshape([4, 3]))


def test_scalars_keep_their_types() -> None:
    assert (scalar(1) + 2).value.dtype == np.int32
    assert (scalar(1.0) * 2).value.dtype == (scalar(1) / 2.0).value.dtype == np.float32
    assert (scalar(3).to(emulator.INT64) * scalar(4)).value.dtype == np.int64
    with np.errstate(over="ignore"):
        assert int(scalar(2**31 - 1) + 1) == -(2**31)
    with pytest.raises(KernelError, match="division by zero"):
        scalar(1) // 0
    names = emulator.load("""
from triton.experimental.gluon import language as gl
numbers = [*range(3, gl.to_tensor(5))]
chosen = [gl.where(numbers[0] == 3, a, b) for a, b in ((1, 2), (1.0, 2.0), (numbers[1], 7))]
""")
    assert [int(n) for n in names["numbers"]] == [3, 4]
    assert [x.value.dtype for x in names["numbers"] + names["chosen"]] == [np.int32] * 3 + [np.float32, np.int32]
    with pytest.raises(KernelError, match="integer"):
        range(scalar(1.0))  # type: ignore[call-overload]


def test_bfloat16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    x = np.array([1, 1 + ulp / 2, 1 + ulp * 3 / 2, 1 + ulp * 0.51, -1 - ulp * 0.49, 3.4e38, -np.inf, 0], np.float32)
    rounded = [1, 1, 1 + 2 * ulp, 1 + ulp, -1, np.inf, -np.inf, 0]
    np.testing.assert_array_equal(emulator.BFLOAT16.round(x), np.array(rounded, np.float32))
    assert np.isnan(emulator.BFLOAT16.round(np.array([np.nan, -np.nan], np.float32))).all()
    assert emulator.FLOAT16.round(np.array([65520.0], np.float32))[0] == np.inf


def test_a_maximum_ignores_nan() -> None:
    x = Tensor(np.array([[np.nan, 1.0, -2.0], [np.nan, np.nan, np.nan]], np.float32))
    language = emulator.load("from triton.experimental.gluon import language as gl")["gl"]
    row_max = language.max(x, 1).value
    assert row_max[0] == 1 and np.isnan(row_max[1])
    np.testing.assert_array_equal(language.maximum(language.max(x, 1), 0.0).value, [1, 0])
