"""Digests of blocks: the same however a file was cut into pieces, and no damaged byte is read unseen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import xxhash
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema import blocks
from sharded_phema.blocks import DIGEST_BYTES, BlockFile, Digester, blocks_of
from sharded_phema.errors import StoreError
from sharded_phema.folder import Want

BLOCK = 16


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", BLOCK)
        yield


class Memory:
    """A folder of one file in memory, which keeps in mind what was read of it."""

    url = "memory"

    def __init__(self, data: bytes) -> None:
        self.data, self.read = bytearray(data), []

    def fill(self, wants: Sequence[Want]) -> None:
        for want in wants:
            end = want.begin + len(want.out)
            self.read.append((want.begin, end))
            if end > len(self.data):
                raise StoreError(f"{want.name}: too short", hint="none")
            want.out[:] = self.data[want.begin : end]


def digests_of(data: bytes) -> bytes:
    return b"".join(xxhash.xxh3_128_digest(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK))


def made(size: int, seed: int = 1) -> tuple[Memory, BlockFile]:
    """A file as it was written, and a reader that has not read anything yet."""
    blocks._kept.clear()
    data = random.Random(seed).randbytes(size)
    memory = Memory(data)
    return memory, BlockFile(memory, "rank.safetensors", size, digests_of(data))


def read(file: BlockFile, begin: int, end: int) -> bytes:
    out = bytearray(end - begin)
    file.fill(begin, memoryview(out))
    return bytes(out)


@examples(80)
@given(st.binary(max_size=100), st.data())
def test_digests_are_those_of_the_blocks_however_the_file_is_cut_into_pieces(data, draw):
    # Oracle: xxhash of each slice of the whole.
    edges = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
    digester = Digester(BLOCK)
    assert b"".join(digester.through(pieces)) == data
    assert digester.digests == digests_of(data) == digester.digests
    assert len(digester.digests) == DIGEST_BYTES * blocks_of(len(data), BLOCK)


@examples(100)
@given(st.integers(0, 100), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=5))
def test_any_ranges_come_back_as_they_were_written(size, ranges):
    memory, file = made(size)
    for a, b in ranges:
        a, b = sorted((min(a, size), min(b, size)))
        assert read(file, a, b) == bytes(memory.data[a:b])
    file.check()


@examples(120)
@given(st.integers(1, 100), st.integers(0, 99), st.integers(0, 7), st.integers(0, 100), st.integers(0, 100))
def test_a_flipped_bit_is_found_exactly_by_who_reads_its_block(size, place, bit, a, b):
    memory, file = made(size)
    whole, place = bytes(memory.data), place % size
    memory.data[place] ^= 1 << bit
    a, b = sorted((min(a, size), min(b, size)))
    block = place // BLOCK
    if a < b and a // BLOCK <= block <= (b - 1) // BLOCK:
        end = min(size, (block + 1) * BLOCK)
        with pytest.raises(StoreError, match=f"damaged between bytes {block * BLOCK} and {end}: expected digest") as e:
            read(file, a, b)
        assert "memory: rank.safetensors" in e.value.message and e.value.hint
    else:
        assert read(file, a, b) == whole[a:b]
    with pytest.raises(StoreError, match="is damaged"):
        file.check()


def test_a_block_is_read_once_and_no_further_than_it_reaches():
    memory, file = made(40)
    read(file, 3, 5)
    read(file, 0, 16)
    read(file, 14, 18)
    assert memory.read == [(0, 16), (16, 32)], "whole blocks, and what was checked stays in memory"
    blocks._kept.clear()
    read(file, 3, 5)
    assert memory.read[2:] == [(3, 5)], "a block that was checked before is not read whole again"


def test_whole_blocks_go_where_they_are_wanted_and_not_into_memory_beside_it():
    memory, file = made(40)
    read(file, 0, 40)
    assert memory.read == [(0, 16), (16, 32), (32, 40)]
    assert not blocks._kept


def test_few_blocks_stay_in_memory():
    count = blocks.KEPT + 5
    _, file = made(count * BLOCK)
    for index in range(count):
        read(file, index * BLOCK + 1, index * BLOCK + 2)
    assert len(blocks._kept) == blocks.KEPT


def test_the_blocks_of_two_files_are_not_mixed_up():
    # The same folder and name at another time: what is kept of the one is not read of the other.
    memory, file = made(20)
    first = read(file, 1, 2)
    memory.data[:] = random.Random(2).randbytes(20)
    other = BlockFile(memory, file.name, 20, digests_of(bytes(memory.data)))
    assert read(other, 1, 2) == bytes(memory.data[1:2]) != first


@pytest.mark.parametrize(("begin", "end"), [(0, 21), (19, 22), (20, 21), (1 << 70, (1 << 70) + 1)])
def test_bytes_beyond_the_end_are_refused_before_anything_is_read(begin, end):
    memory, file = made(20)
    with pytest.raises(StoreError, match="something beyond is asked for"):
        read(file, begin, end)
    assert memory.read == []


def test_a_record_with_too_few_digests_is_refused():
    memory, file = made(40)
    short = BlockFile(memory, file.name, 40, file.digests[: 2 * DIGEST_BYTES])
    assert (short.digest(1), short.digest(2)) == (xxhash.xxh3_128_digest(memory.data[16:32]), b"")
    assert read(short, 0, 32) == bytes(memory.data[:32])
    for act in (short.check, lambda: read(short, 32, 33)):
        with pytest.raises(StoreError, match="40 bytes and 2 digests"):
            act()


def test_a_file_that_was_cut_short_or_grew_is_found_by_a_check():
    memory, file = made(40)
    memory.data += b"x"
    with pytest.raises(StoreError, match="longer than the 40 bytes"):
        file.check()
    del memory.data[39:]
    with pytest.raises(StoreError, match="too short"):
        file.check()
