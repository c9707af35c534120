"""Streams: what they give is the file, damage is told wherever they looked, and nothing is read without need."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import xxhash
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema import blocks, stream
from sharded_phema.blocks import BlockFile
from sharded_phema.errors import StoreError
from sharded_phema.folder import open_folder
from sharded_phema.stream import Stream

BLOCK = 16


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks and gaps of a few bytes, so that small files have many."""
    with (
        mock.patch.object(blocks, "BLOCK_BYTES", BLOCK),
        mock.patch.object(blocks.blocks_of, "__defaults__", (BLOCK,)),
        mock.patch.object(stream, "BLOCK_BYTES", BLOCK),
        mock.patch.object(stream, "GAP_BYTES", 5),
    ):
        yield


def file_of(folder: str, data: bytes, digests: int | None = None) -> BlockFile:
    """A file on disk, with the digests of what it should hold."""
    Path(folder, "file").write_bytes(data)
    every = [xxhash.xxh3_128_digest(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    return BlockFile(open_folder(folder), "file", len(data), b"".join(every[:digests]))


sizes = st.one_of(
    st.integers(1, 6 * BLOCK), st.builds(lambda n, off: n * BLOCK + off, st.integers(1, 6), st.integers(-1, 1))
)


@st.composite
def reads(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes of a file, and ranges of it: one after another, backward, overlapping, empty, or with gaps."""
    size = draw(sizes)
    data = draw(st.binary(min_size=size, max_size=size))
    ranges: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 8))):
        begin = draw(st.one_of(st.just(ranges[-1][1] if ranges else 0), st.integers(0, size)))
        ranges.append((begin, draw(st.integers(begin, min(size, begin + 3 * BLOCK)))))
    return data, ranges


def given_by(stream: Stream, ranges: list[tuple[int, int]], closing: frozenset[int] = frozenset()) -> list[bytes]:
    found = []
    for number, (begin, end) in enumerate(ranges):
        out = bytearray(end - begin)
        stream.fill(begin, memoryview(out))
        found.append(bytes(out))
        if number in closing:
            stream.close()
    return found


@examples(120)
@given(reads(), st.frozensets(st.integers(0, 7)))
def test_what_is_given_is_the_file_wherever_it_is_closed_meanwhile(case, closing) -> None:
    # Oracle: slices of the bytes.
    data, ranges = case
    with tempfile.TemporaryDirectory() as folder:
        read = Stream(file_of(folder, data))
        assert given_by(read, ranges, closing) == [data[begin:end] for begin, end in ranges]
        read.finish()
        assert given_by(read, ranges) == [data[begin:end] for begin, end in ranges], "it goes on after finish"
        read.close()
        read.close()


@examples(120)
@given(reads(), st.data())
def test_a_damaged_byte_is_told_by_the_end_where_its_block_was_touched_and_nowhere_else(case, data) -> None:
    # Oracle: which blocks the ranges have bytes in. An empty range touches none; it may show damage all the same.
    content, ranges = case
    victim = data.draw(st.integers(0, len(content) - 1))
    touched = {block for begin, end in ranges for block in range(begin // BLOCK, -(-end // BLOCK)) if begin < end}
    looked = touched | {begin // BLOCK for begin, _ in ranges}
    with tempfile.TemporaryDirectory() as folder:
        read = Stream(file_of(folder, content))
        harmed = bytearray(content)
        harmed[victim] ^= 1 << data.draw(st.integers(0, 7))
        Path(folder, "file").write_bytes(harmed)
        first = victim // BLOCK * BLOCK
        told = f"file is damaged between bytes {first} and {min(first + BLOCK, len(content))}: expected digest"
        try:
            given_by(read, ranges)
            read.finish()
        except StoreError as error:
            assert victim // BLOCK in looked
            assert told in error.message and error.hint
        else:
            assert victim // BLOCK not in touched
        finally:
            read.close()


@examples(120)
@given(reads())
def test_what_is_read_beyond_what_is_wanted_is_at_most_the_rest_of_two_blocks_a_jump(case) -> None:
    # A jump costs the rest of the block that is left, and the beginning of the one that is entered.
    data, ranges = case
    ranges = [(begin, end) for begin, end in ranges if begin < end]
    with tempfile.TemporaryDirectory() as folder:
        read = Stream(file_of(folder, data))
        given_by(read, ranges)
        read.finish()
        read.close()
    jumps = sum(last[1] != next_[0] for last, next_ in itertools.pairwise([(0, 0), *ranges]))
    wanted = sum(end - begin for begin, end in ranges)
    assert wanted <= read.bytes_read <= wanted + 2 * (BLOCK - 1) * (jumps + 1)
    gaps = sum(next_[0] - last[1] for last, next_ in itertools.pairwise([(0, 0), *ranges]))
    if all(last[1] <= next_[0] for last, next_ in itertools.pairwise(ranges)):
        assert read.bytes_read <= wanted + gaps + BLOCK - 1, "forward, no byte is read twice"


@examples(40)
@given(reads(), st.lists(st.integers(1, 3 * BLOCK), max_size=5))
def test_ranges_that_follow_each_other_read_the_file_once_in_as_many_requests(case, lengths) -> None:
    data, _ = case
    ends = [min(end, len(data)) for end in itertools.accumulate(lengths)]
    ranges = list(itertools.pairwise([0, *ends]))
    with tempfile.TemporaryDirectory() as folder:
        file = file_of(folder, data)
        read, asked = Stream(file), []
        opened = file.folder.open("file")

        def fill(self: object, begin: int, view: memoryview) -> None:
            asked.append((begin, begin + len(view)))

        # What is asked for, not what it is: zeros are no such file.
        with (
            mock.patch.object(type(opened), "fill", fill),
            mock.patch.object(BlockFile, "check_digest", lambda *_: None),
        ):
            given_by(read, ranges)
        opened.close()
        read.close()
    assert [span for span in asked if span[0] < span[1]] == [span for span in ranges if span[0] < span[1]]


def test_a_file_is_opened_when_it_is_first_read_and_held_open_until_it_is_closed(tmp_path) -> None:
    read = Stream(file_of(str(tmp_path), bytes(range(40))))
    before = len(os.listdir("/proc/self/fd"))
    read.finish()
    assert len(os.listdir("/proc/self/fd")) == before
    given_by(read, [(0, 3), (3, 40)])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    read.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("begin", [0, 30, 39, 40, 41, 47, 48, 1000, 1 << 62])
def test_what_lies_beyond_the_file_or_its_digests_is_one_error_before_anything_is_read(tmp_path, begin) -> None:
    data = bytes(range(40))
    read = Stream(file_of(str(tmp_path), data))
    with pytest.raises(StoreError, match="something beyond is asked for") as caught:
        read.fill(begin, memoryview(bytearray(41)))
    assert caught.value.hint and read.bytes_read == 0
    short = Stream(file_of(str(tmp_path), data, digests=1))
    assert given_by(short, [(0, BLOCK)]) == [data[:BLOCK]]
    with pytest.raises(StoreError, match="something beyond is asked for"):
        short.fill(BLOCK, memoryview(bytearray(1)))
    short.close()


@pytest.mark.parametrize("harm", ["missing", "cut short", "a folder"])
def test_a_file_that_is_gone_or_cut_short_is_one_error(tmp_path, harm) -> None:
    read, path = Stream(file_of(str(tmp_path), bytes(range(40)))), tmp_path / "file"
    path.unlink()
    if harm == "cut short":
        path.write_bytes(bytes(range(30)))
    elif harm == "a folder":
        path.mkdir()
    with pytest.raises(StoreError, match="file") as caught:
        given_by(read, [(0, 40)])
    assert caught.value.hint
    read.close()


def test_what_was_given_before_damage_shows_can_be_told_apart_by_finish_alone(tmp_path) -> None:
    # The last byte of the block is damaged: what comes before is given, and proven wrong only when the block ends.
    read = Stream(file_of(str(tmp_path), bytes(BLOCK)))
    (tmp_path / "file").write_bytes(bytes(BLOCK - 1) + b"x")
    assert given_by(read, [(0, BLOCK - 1)]) == [bytes(BLOCK - 1)]
    with pytest.raises(StoreError, match="is damaged"):
        read.finish()
    read.close()
