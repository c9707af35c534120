"""Journals: which blocks are done, told by each process in a file of its own, so that no cut of any misleads."""

from __future__ import annotations

import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import StoreError
from sharded_phema.folder.disk import flush, pour
from sharded_phema.folder.temporary import place_here, temporary_name
from sharded_phema.job.place import names

__all__ = ["append", "look_afresh", "marked"]

MARK = re.compile(rb"(([0-9]{1,18}) ([0-9]{1,18})) ([0-9a-f]{8})")


def append(folder: Path, token: str, first: int, last: int) -> None:
    """Note that blocks from ``first`` to before ``last`` are done, in the journal of this process; it is safe then.

    Args:
        folder: Of the journals.
        token: Tells several journals of one process apart.
        first: The first block.
        last: The one after the last.
    """
    path = str(folder / f"{place_here()}-{os.getpid()}-{token}.txt")
    span = b"%d %d" % (first, last)
    # A mark that failed may have left a piece of itself, which must not run into this one.
    line = b"\n%s %08x\n" % (span, zlib.crc32(span))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        pour(descriptor, [line], path)
    except StoreError as error:
        raise error.__cause__ or error from None
    flush(str(folder))


def marked(folder: Path, blocks: int) -> NDArray[np.bool_]:
    """Whether each block is noted in any journal, of shape (blocks,)."""
    done = np.zeros(blocks, np.bool_)
    for name in names(folder):
        if name.endswith(".txt"):
            with suppress(FileNotFoundError):  # the output was put in place since
                for line in (folder / name).read_bytes().split(b"\n"):
                    found = MARK.fullmatch(line)
                    if found and zlib.crc32(found[1]) == int(found[4], 16):
                        done[int(found[2]) : int(found[3])] = True
    return done


def look_afresh(folder: Path) -> None:
    """Have the next look see the journals of other machines.

    A network file system may show an older listing for a minute; a change by this machine makes it ask again. Without
    that the last two processes could each miss the other's journal, and neither would commit.
    """
    path = folder / temporary_name("look")
    with suppress(FileNotFoundError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        os.unlink(path)
