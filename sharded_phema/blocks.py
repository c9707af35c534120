"""Blocks: the digests by which a damaged byte of a tensor file is told, when it is written and when it is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import xxhash

from sharded_phema.errors import StoreError
from sharded_phema.folder import Buffer, Folder, Want
from sharded_phema.folder.contract import bytes_of

__all__ = ["BLOCK_BYTES", "DIGEST_BYTES", "KEPT_BYTES", "BlockFile", "Digester", "blocks_of"]

BLOCK_BYTES = 4 << 20
"""Bytes of a file that share a digest; its last block may be shorter."""

DIGEST_BYTES = 16
"""Bytes of the XXH3-128 digest of a block."""

KEPT = 16
"""Blocks that stay in memory after they were checked, over all files."""

KEPT_BYTES = KEPT * BLOCK_BYTES
"""What they take (64 MiB)."""


class Digester:
    """Passes the pieces of a file on and keeps the XXH3-128 digest of every block."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block, self._filled = block_bytes, 0
        self._running = xxhash.xxh3_128()
        self._digests = bytearray()

    def through(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """The same pieces, seen on their way."""
        for piece in pieces:
            self._see(bytes_of(piece))
            yield piece

    @property
    def digests(self) -> bytes:
        """Digests of the blocks so far end to end, that of an unfinished one last."""
        return bytes(self._digests) + (self._running.digest() if self._filled else b"")

    def _see(self, view: memoryview) -> None:
        while view:
            part, view = view[: self._block - self._filled], view[self._block - self._filled :]
            self._running.update(part)
            self._filled += len(part)
            if self._filled == self._block:
                self._digests += self._running.digest()
                self._running, self._filled = xxhash.xxh3_128(), 0


def blocks_of(size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """How many blocks a file of so many bytes has."""
    return -(-size // block_bytes)


_kept: OrderedDict[tuple[str, str, int, bytes], bytearray] = OrderedDict()


@dataclass(frozen=True)
class BlockFile:
    """A file whose length and digests are known from a record.

    Attributes:
        folder: Where it lies.
        name: The file.
        size: Its bytes.
        digests: Of its blocks, end to end.
    """

    folder: Folder
    name: str
    size: int
    digests: bytes = field(repr=False)
    _proven: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def fill(self, begin: int, out: memoryview) -> None:
        """Fill memory with bytes of the file, after the blocks that they lie in were checked.

        A block is read whole once, and checked; what is wanted of it later is read alone.

        Raises:
            StoreError: A block is damaged, or the file is missing, short, or cannot be read.
        """
        self.check_range(begin, len(out))
        while out:
            index = begin // BLOCK_BYTES
            part = out[: (index + 1) * BLOCK_BYTES - begin]
            self._fill_part(index, begin, part)
            begin, out = begin + len(part), out[len(part) :]

    def check(self) -> None:
        """Read and check all of it.

        Raises:
            StoreError: As of ``fill``; or the file is longer than its record says.
        """
        for index in range(blocks_of(self.size, BLOCK_BYTES)):
            self._block(index)
        try:
            self.folder.fill([Want(self.name, self.size, bytearray(1))])
        except StoreError:
            return  # there is no such byte, as it should be
        raise StoreError(
            f"{self.folder.url}: {self.name} is longer than the {self.size} bytes that its record says",
            hint="something was appended, or the file was swapped; restore it from a backup",
        )

    def check_range(self, begin: int, length: int) -> None:
        """Prove that the record knows of such bytes.

        Raises:
            StoreError: They lie outside of the file, or blocks there have no digests.
        """
        if begin + length > self.size or blocks_of(begin + length) * DIGEST_BYTES > len(self.digests):
            raise self._too_short()

    def check_digest(self, index: int, found: bytes) -> None:
        """Prove that a block is what was written, by its digest.

        Raises:
            StoreError: It is damaged.
        """
        if found != self.digest(index):
            first = index * BLOCK_BYTES
            raise StoreError(
                f"{self.folder.url}: {self.name} is damaged between bytes {first} and {first + self._length(index)}: "
                f"expected digest {self.digest(index).hex()}, found {found.hex()}",
                hint="restore the file from a backup, or leave the snapshot out",
            )

    def digest(self, index: int) -> bytes:
        """XXH3-128 of a block, 16 bytes; none where the record holds no digest of such a block."""
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def _fill_part(self, index: int, begin: int, part: memoryview) -> None:
        key = (self.folder.url, self.name, index, self.digest(index))
        if (kept := _kept.get(key)) is not None:
            start = begin - index * BLOCK_BYTES
            part[:] = kept[start : start + len(part)]
        elif index in self._proven:
            self.folder.fill([Want(self.name, begin, part)])
        elif begin == index * BLOCK_BYTES and len(part) == self._length(index):
            self.folder.fill([Want(self.name, begin, part)])
            self._prove(index, part)
        else:
            start = begin - index * BLOCK_BYTES
            block = _kept[key] = self._block(index)
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
            part[:] = block[start : start + len(part)]

    def _block(self, index: int) -> bytearray:
        block = bytearray(self._length(index))
        self.folder.fill([Want(self.name, index * BLOCK_BYTES, block)])
        self._prove(index, memoryview(block))
        return block

    def _length(self, index: int) -> int:
        length = min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)
        if length <= 0 or not self.digest(index):
            raise self._too_short()
        return length

    def _too_short(self) -> StoreError:
        return StoreError(
            f"{self.folder.url}: {self.name} has {self.size} bytes and {len(self.digests) // DIGEST_BYTES} digests, "
            "and something beyond is asked for",
            hint="the records of the run were edited or mixed; restore the run folder",
        )

    def _prove(self, index: int, block: memoryview) -> None:
        self.check_digest(index, xxhash.xxh3_128_digest(block))
        self._proven.add(index)
