"""NumPy arrays, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashcore
from reference import BANDS, SHAPES, Case, assert_correct

DTYPES = (np.float16, np.float32, np.float64)


def arrays(case: Case, dtype: type) -> list[np.ndarray]:
    return [x.numpy() for x in case.tensors("cpu", torch.from_numpy(np.empty(0, dtype)).dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SHAPES, *BANDS], ids=str)
def test_is_bit_identical_to_torch(case: Case, dtype: type) -> None:
    inputs = arrays(case, dtype)
    out, lse = flashcore.attention(*inputs, return_lse=True, **case.options)
    tensors = tuple(torch.from_numpy(x) for x in inputs)
    expected, expected_lse = flashcore.attention(*tensors, return_lse=True, **case.options)
    assert type(out) is type(lse) is np.ndarray
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(lse, expected_lse.numpy())
    assert_correct(case, tensors, torch.from_numpy(out))


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 1, 5, 1)], ids=str)
def test_masks(shape: tuple[int, ...]) -> None:
    inputs = arrays(Case(), np.float32)
    mask = np.random.default_rng(0).random(shape) > 0.3
    expected = flashcore.attention(*map(torch.from_numpy, (*inputs, mask)))
    np.testing.assert_array_equal(flashcore.attention(*inputs, mask), expected.numpy())


def test_strided_reversed_and_read_only_inputs() -> None:
    query, key, value = arrays(Case(seq_q=8, seq_k=8), np.float32)
    expected = flashcore.attention(query, key, value)
    reversed_key, reversed_value = (np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (key, value))
    assert reversed_key.strides[2] < 0
    np.testing.assert_array_equal(flashcore.attention(query, reversed_key, reversed_value), expected)
    permuted = query.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
    permuted.flags.writeable = False
    np.testing.assert_array_equal(flashcore.attention(permuted, key, value), expected)


def test_out() -> None:
    query, key, value = arrays(Case(), np.float32)
    out = np.zeros((2, 5, 3, 16), np.float32).transpose(0, 2, 1, 3)
    assert flashcore.attention(query, key, value, out=out) is out
    np.testing.assert_array_equal(out, flashcore.attention(query, key, value))


class Subclass(np.ndarray):
    pass


def big_endian(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder())


def unaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[:] = x
    return view


def odd_stride(x: np.ndarray) -> np.ndarray:
    record = np.zeros(x.shape, np.dtype([("x", x.dtype), ("pad", np.uint8)]))
    record["x"] = x
    return record["x"]


REFUSED = {
    "integers": (lambda x: x.astype(np.int32), r"query: given dtype int32; accepted f16"),
    "complex": (lambda x: x.astype(np.complex64), r"query: given dtype complex64"),
    "objects": (lambda x: x.astype(object), r"query: given dtype object"),
    "byte order": (big_endian, r"query: given dtype >f4"),
    "subclass": (lambda x: x.view(Subclass), r"query: given .*Subclass, a subclass of numpy.ndarray"),
    "masked": (np.ma.masked_array, r"query: given .*MaskedArray, a subclass of numpy.ndarray"),
    "unaligned": (unaligned, r"query: given address 0x[0-9a-f]+; accepted a non-null address that is a multiple of 4"),
    "odd stride": (odd_stride, r"query: given a stride of \d+ bytes; accepted strides that are multiples"),
    "rank": (lambda x: x[0, 0, 0], r"query: given 1 dimensions"),
    "last dim": (lambda x: np.repeat(x, 2, axis=3)[..., ::2], r"query: given strides .*contiguous last dimension"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    query, key, value = arrays(Case(), np.float32)
    change, message = REFUSED[name]
    with pytest.raises(flashcore.InvalidArgumentError, match=message):
        flashcore.attention(change(query), key, value)


def test_refuses_outputs() -> None:
    query, key, value = arrays(Case(), np.float32)
    out = np.full_like(query, 3.0)
    out.flags.writeable = False
    with pytest.raises(flashcore.InvalidArgumentError, match="out: given a read-only array"):
        flashcore.attention(query, key, value, out=out)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"out: given strides .* accepted strides >= 0"):
        flashcore.attention(query, key, value, out=np.full_like(query, 3.0)[:, :, ::-1])
    with pytest.raises(flashcore.InvalidArgumentError, match=r"key: given .*torch.Tensor; accepted a numpy.ndarray"):
        flashcore.attention(query, torch.from_numpy(key), value)
    assert np.all(out == 3.0)
