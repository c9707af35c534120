"""Streams: a tensor file read from front to back, every byte hashed as it passes, every block checked at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import xxhash

from sharded_phema.blocks import BLOCK_BYTES, DIGEST_BYTES, BlockFile
from sharded_phema.folder import OpenFile

__all__ = ["Stream"]

GAP_BYTES = 1 << 18
"""What is read only because it shares a block with what is wanted is read in such pieces."""


@dataclass(slots=True)
class Stream:
    """One pass over a file. Nothing of it is kept in memory but the running digest of one block.

    What ``fill`` gives is proven only once its block has passed: by a later ``fill``, or by ``finish``. Whoever uses
    it before must be able to take back what was made of it. Each block is read once as long as ranges follow each
    other; a range that begins in another block costs what lies between it and the beginning of that block, and the
    rest of the block that was left.

    Attributes:
        file: The file, with the digests of its blocks.
        bytes_read: Bytes that were read so far, those between the wanted ranges included.
    """

    file: BlockFile
    bytes_read: int = 0
    _at: int = field(init=False)
    _end: int = field(init=False)
    _hash: xxhash.xxh3_128 = field(init=False)
    _known: int = field(init=False)
    _open: OpenFile | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._known = min(self.file.size, len(self.file.digests) // DIGEST_BYTES * BLOCK_BYTES)
        self._enter(0)

    def fill(self, begin: int, out: memoryview) -> None:
        """Fill memory with bytes of the file from ``begin`` on.

        Raises:
            StoreError: A block that passed is damaged, or the file is missing, short, or cannot be read.
        """
        if begin + len(out) > self._known:
            self.file.check_range(begin, len(out))
        if begin != self._at:
            self._move(begin)
        self._read(out)

    def finish(self) -> None:
        """Prove all that ``fill`` gave so far.

        Raises:
            StoreError: As of ``fill``.
        """
        if self._at % BLOCK_BYTES:
            self._skip(self._end)

    def close(self) -> None:
        """Close the file. The stream can go on: it opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _move(self, begin: int) -> None:
        if not self._at <= begin < self._end:
            self.finish()
            self._enter(begin // BLOCK_BYTES * BLOCK_BYTES)
        self._skip(begin)

    def _skip(self, end: int) -> None:
        """Read on to ``end`` for the digest's sake."""
        while self._at < end:
            self._read(memoryview(bytearray(min(end - self._at, GAP_BYTES))))

    def _read(self, out: memoryview) -> None:
        if self._open is None:
            self._open = self.file.folder.open(self.file.name)
        self._open.fill(self._at, out)
        self.bytes_read += len(out)
        while out:
            room = self._end - self._at
            part = out if len(out) <= room else out[:room]
            self._hash.update(part)
            self._at += len(part)
            if len(part) == room:
                self.file.check_digest((self._end - 1) // BLOCK_BYTES, self._hash.digest())
                self._enter(self._at)
            out = out[len(part) :]

    def _enter(self, begin: int) -> None:
        """Begin with the block that begins there."""
        self._at, self._end = begin, min(begin + BLOCK_BYTES, self.file.size)
        self._hash = xxhash.xxh3_128()
