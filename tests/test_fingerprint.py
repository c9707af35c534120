"""Fingerprints: the pieces of a tensor add up to the whole however it is cut, and every change shows."""

from unittest import mock

import pytest
import torch
from builders import examples, shapes
from hypothesis import given
from hypothesis import strategies as st
from worlds import cuts, shard_of

from sharded_phema import fingerprint
from sharded_phema.fingerprint import MODULUS, fingerprints
from sharded_phema.layout import whole

DTYPES = [torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


def random_bits(shape, dtype, seed):
    """Any bits at all: NaN, infinities and negative zeros are among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (data & 1 if dtype == torch.bool else data).view(dtype).view(shape)


def mark(tensor):
    return fingerprints([shard_of(tensor, (whole(tensor.shape),))])[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pieces_add_up_to_the_whole_however_it_is_cut(dtype):
    @examples(25)
    @given(shape=shapes, seed=st.integers(0, 99), chunk=st.sampled_from([1, 2, 3, 7, 1 << 20]), data=st.data())
    def check(shape, seed, chunk, data):
        tensor = random_bits(shape, dtype, seed)
        pieces = [shard_of(tensor, boxes) for boxes in data.draw(cuts(shape, data.draw(st.integers(1, 4))))]
        with mock.patch.object(fingerprint, "CHUNK", chunk):
            found = fingerprints(pieces)
        assert all(0 <= value < MODULUS for value in found)
        assert sum(found) % MODULUS == mark(tensor)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bit_that_flips_shows(dtype):
    tensor = random_bits((3, 5), dtype, 1)
    before, raw = mark(tensor), tensor.view(torch.uint8).view(-1)
    seen = {before}
    for byte in range(raw.numel()):
        for bit in range(1 if dtype == torch.bool else 8):
            raw[byte] ^= 1 << bit
            seen.add(mark(tensor))
            raw[byte] ^= 1 << bit
    assert mark(tensor) == before
    assert len(seen) == 1 + raw.numel() * (1 if dtype == torch.bool else 8), "every flip has a fingerprint of its own"


def test_two_signs_that_flip_show():
    """The highest bits are what multiplying spreads the least."""
    before = torch.randn(60, dtype=torch.float64)
    marks = {mark(before)}
    for a in range(60):
        for b in range(a):
            tensor = before.clone()
            tensor[[a, b]] *= -1
            marks.add(mark(tensor))
    assert len(marks) == 1 + 60 * 59 // 2


@examples(100)
@given(order=st.permutations(range(6)), shape=st.sampled_from([(6,), (2, 3), (3, 2), (6, 1)]))
def test_elements_that_change_places_show(order, shape):
    values = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, float("nan")])
    moved = values[list(order)]
    same = torch.equal(moved.view(torch.int32), values.view(torch.int32))
    assert (mark(moved.view(shape)) == mark(values.view(shape))) == same


def test_a_tensor_that_is_not_contiguous_counts_by_its_elements_and_not_by_its_memory():
    tensor = random_bits((4, 6, 2), torch.float32, 3)
    strided = [tensor.clone().transpose(0, 2).contiguous().transpose(0, 2), torch.stack([tensor, tensor], -1)[..., 0]]
    assert not any(other.is_contiguous() for other in strided)
    assert {mark(other) for other in strided} == {mark(tensor)}


def test_scalars_and_tensors_without_elements_have_fingerprints():
    assert mark(torch.tensor(1.0)) != mark(torch.tensor(2.0))
    assert [mark(torch.empty(shape)) for shape in ((0,), (0, 3), (3, 0))] == [0, 0, 0]
    assert fingerprints([]) == []


def test_many_shards_are_marked_in_their_order():
    tensors = [random_bits((5,), dtype, 1) for dtype in (torch.float32, torch.int64, torch.bool)]
    assert fingerprints([shard_of(tensor, (whole(tensor.shape),)) for tensor in tensors]) == [*map(mark, tensors)]
