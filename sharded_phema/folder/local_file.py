"""An open file of a disk, read from front to back: what comes next is fetched while what is there is worked on."""

from __future__ import annotations

import os
from contextlib import suppress

from sharded_phema.folder.disk import failing, failure, fill_range, opened_descriptor

__all__ = ["LocalFile"]

AHEAD_BYTES = 8 << 20
"""How much of a file that is not in memory the system is asked to fetch before it is needed."""


class LocalFile:
    """A regular file, open for reading.

    The system reads ahead by little on its own. Where the first range is not in its memory, it is asked for the
    next ones in advance, so that the disk works while sums are made. No thread is needed for that.

    Args:
        path: Absolute path, links resolved.

    Raises:
        StoreError: It is missing, no regular file, or cannot be opened.
    """

    __slots__ = ("_asked", "_cold", "_descriptor", "_path", "_size")

    def __init__(self, path: str) -> None:
        with failing(path, "read"):
            self._descriptor, self._size = opened_descriptor(path)
        self._path, self._cold, self._asked = path, False, -1

    def fill(self, begin: int, view: memoryview) -> None:
        """Fill memory with its bytes from ``begin`` on."""
        if self._asked < 0:
            self._cold, self._asked = self._is_cold(begin), begin
        if self._cold and begin + len(view) + AHEAD_BYTES // 2 > self._asked:
            self._ask(begin + len(view))
        try:
            # Beyond the end nothing is read: offsets of a hostile record may be more than the system takes.
            if begin + len(view) <= self._size and os.preadv(self._descriptor, [view], begin) == len(view):
                return
            fill_range(self._path, self._descriptor, self._size, begin, view)
        except OSError as error:
            raise failure(self._path, "read", error) from error

    def close(self) -> None:
        """Close it. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.close()

    def _is_cold(self, begin: int) -> bool:
        """Whether a read would have to wait for the disk; where the system does not tell, it is taken to be so."""
        if not hasattr(os, "RWF_NOWAIT"):
            return hasattr(os, "posix_fadvise")
        try:
            return begin < self._size and not os.preadv(self._descriptor, [bytearray(1)], begin, os.RWF_NOWAIT)
        except OSError:
            return True

    def _ask(self, begin: int) -> None:
        begin = max(begin, self._asked)
        if begin < self._size:
            with suppress(OSError):  # a wish that the system need not grant
                os.posix_fadvise(self._descriptor, begin, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        self._asked = begin + AHEAD_BYTES
