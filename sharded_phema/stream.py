"""Streams: a tensor file read from front to back, every byte hashed as it passes, every block checked at its end."""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

import xxhash

from sharded_phema.blocks import BLOCK_BYTES, DIGEST_BYTES, BlockFile
from sharded_phema.folder import OpenFile

__all__ = ["Passing", "Stream"]

_spare = threading.local()

GAP_BYTES = 1 << 18
"""What is read only because it shares a block with what is wanted is read in such pieces."""


class Passing(Protocol):
    """Bytes that are read from front to back; see ``Stream``, which is one.

    Attributes:
        bytes_read: Bytes that were read so far.
    """

    bytes_read: int

    def fill(self, begin: int, out: memoryview) -> None:
        """Fill memory with the bytes from ``begin`` on."""

    def check(self) -> None:
        """Prove what ``fill`` gave since the last time, as far as that can be done yet."""

    def finish(self) -> None:
        """Prove all that ``fill`` gave."""

    def close(self) -> None:
        """Close what is open; reading can go on."""


class Stream:
    """One pass over a file. Nothing of it is kept in memory but the running digest of one block.

    What ``fill`` gives is hashed by ``check``, which another thread may call, and is proven only once its block has
    passed: by a later ``check``, or by ``finish``. Whoever uses it before must be able to take back what was made of
    it. Each block is read once as long as ranges follow each other; a range that begins in another block
    costs what lies between it and the beginning of that block, and the rest of the block that was left.

    Args:
        file: The file, with the digests of its blocks.

    Attributes:
        bytes_read: Bytes that were read so far, those between the wanted ranges included.
    """

    __slots__ = ("_at", "_end", "_hash", "_hashed", "_known", "_open", "_passed", "bytes_read", "file")

    def __init__(self, file: BlockFile) -> None:
        self.file, self.bytes_read = file, 0
        self._known = min(file.size, len(file.digests) // DIGEST_BYTES * BLOCK_BYTES)
        self._at, self._end = 0, min(BLOCK_BYTES, file.size)
        self._hash, self._hashed = xxhash.xxh3_128(), 0
        self._passed: deque[tuple[int, memoryview]] = deque()
        self._open: OpenFile | None = None

    def fill(self, begin: int, out: memoryview) -> None:
        """Fill memory with bytes of the file from ``begin`` on. It must stay as it is until ``check`` saw it.

        Raises:
            StoreError: The file is missing, short, or cannot be read.
        """
        if begin + len(out) > self._known:
            self.file.check_range(begin, len(out))
        if begin != self._at:
            self._move(begin)
        self._read(out)

    def check(self) -> None:
        """Hash what ``fill`` gave since the last time. May run while ``fill`` does.

        Raises:
            StoreError: A block that passed is damaged.
        """
        while self._passed:
            begin, view = self._passed.popleft()
            if begin != self._hashed:
                self._hash, self._hashed = xxhash.xxh3_128(), begin
            while view:
                block = self._hashed // BLOCK_BYTES
                room = min((block + 1) * BLOCK_BYTES, self.file.size) - self._hashed
                part = view if len(view) <= room else view[:room]
                self._hash.update(part)
                self._hashed += len(part)
                if len(part) == room:
                    self.file.check_digest(block, self._hash.digest())
                    self._hash = xxhash.xxh3_128()
                view = view[len(part) :]

    def finish(self) -> None:
        """Prove all that ``fill`` gave so far.

        Raises:
            StoreError: As of ``fill`` and ``check``.
        """
        room = _room()
        while self._at % BLOCK_BYTES and self._at < self._end:
            self.check()  # it sees what lies in the room, before something else does
            self._read(room[: self._end - self._at])
        self.check()

    def close(self) -> None:
        """Close the file. The stream can go on: it opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _move(self, begin: int) -> None:
        if not self._at <= begin < self._end:
            self._skip(self._end)
            self._at = begin // BLOCK_BYTES * BLOCK_BYTES
            self._end = min(self._at + BLOCK_BYTES, self.file.size)
        self._skip(begin)

    def _skip(self, end: int) -> None:
        """Read on to ``end`` for the digest's sake, if anything of the block was read."""
        if self._at % BLOCK_BYTES == 0 and end == self._end:
            return
        while self._at < end:
            self._read(memoryview(bytearray(min(end - self._at, GAP_BYTES))))

    def _read(self, out: memoryview) -> None:
        if self._open is None:
            self._open = self.file.folder.open(self.file.name)
        self._open.fill(self._at, out)
        self._passed.append((self._at, out))
        self.bytes_read += len(out)
        self._at += len(out)
        if self._at >= self._end:
            self._end = min(self._at // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES, self.file.size)


def _room() -> memoryview:
    """Memory of this thread for bytes that are only hashed: fresh memory would cost more than reading them."""
    room: memoryview = getattr(_spare, "room", memoryview(b""))
    if len(room) != GAP_BYTES:
        room = _spare.room = memoryview(bytearray(GAP_BYTES))
    return room
