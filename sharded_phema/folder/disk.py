"""What happens to one file of a disk: read, written, given its name, made durable; each failure is one error."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from sharded_phema.errors import StoreError
from sharded_phema.folder.contract import Buffer, bytes_of

__all__ = [
    "failing",
    "failure",
    "fill_range",
    "flush",
    "give_name",
    "make_folders",
    "opened",
    "opened_descriptor",
    "pour",
    "refuse_existing",
    "unlink",
]

PIECE_BYTES = 16 << 20
"""Bytes that one system call writes at most."""

NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How file systems say that they have no hard links."""

MENDS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "give this user the permission",
    errno.EPERM: "give this user the permission",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


@contextmanager
def failing(path: str, act: str) -> Iterator[None]:
    """Turn what the system reports into one error."""
    try:
        yield
    except FileNotFoundError as error:
        if act != "read":
            raise failure(path, act, error) from error
        raise StoreError(
            f"{path}: expected a file, found none", hint="restore it from a backup, or leave out what needs it"
        ) from error
    except OSError as error:
        raise failure(path, act, error) from error


def failure(path: str, act: str, error: OSError) -> StoreError:
    """The one error that says what the system reports."""
    mend = MENDS.get(error.errno or 0, "check the storage")
    intact = "; earlier snapshots are intact" if act == "written" else ""
    return StoreError(f"{path}: cannot be {act}: {error.strerror or error}", hint=mend + intact)


@contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
    """A regular file, open for reading, and its size."""
    descriptor, size = opened_descriptor(path)
    try:
        yield descriptor, size
    finally:
        os.close(descriptor)


def opened_descriptor(path: str) -> tuple[int, int]:
    """The same, for the caller to close."""
    # A pipe in the place of a file must not block, nor may a link that took the place of the file since be followed.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StoreError(f"{path}: expected a file, found something else", hint="restore the run folder from a backup")
    return descriptor, status.st_size


def fill_range(path: str, descriptor: int, size: int, begin: int, view: memoryview) -> None:
    """Fill memory with the bytes of an open file from ``begin`` on, all of which must be there."""
    end, done = begin + len(view), 0
    while done < len(view):
        # Beyond the end nothing is read: offsets of a hostile record may be more than the system takes.
        count = os.preadv(descriptor, [view[done:]], begin + done) if end <= size else 0
        if not count:
            raise StoreError(
                f"{path}: expected {end} bytes or more, found {min(size, begin + done) if end <= size else size}",
                hint="the file was cut short; restore it from a backup, or leave out what needs it",
            )
        done += count


def refuse_existing(path: str) -> None:
    """Prove that nothing has this name."""
    if os.path.lexists(path):
        raise StoreError(f"{path}: exists already, and no file is ever replaced", hint="use another run folder")


def make_folders(folder: str) -> list[str]:
    """Make a folder and those above it; those that were missing, innermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with suppress(FileExistsError):  # by another process, since
            os.mkdir(path)
    return missing


def pour(descriptor: int, pieces: Iterable[Buffer], path: str) -> int:
    """Write, have it on disk, and close, whatever happens."""
    size = 0
    try:
        for piece in pieces:
            view = bytes_of(piece)
            size += len(view)
            with failing(path, "written"):
                while view:
                    view = view[os.write(descriptor, view[:PIECE_BYTES]) :]
        with failing(path, "written"):
            os.fsync(descriptor)
    finally:
        # Network file systems report here what they could not write.
        with failing(path, "written"):
            os.close(descriptor)
    return size


def give_name(temporary: str, path: str) -> None:
    """Give a finished file its name, in one moment and never in the place of another; the old name may stay."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno == errno.EEXIST:
            # Over a network a request that is sent again may find the name that it made itself.
            if os.path.samefile(temporary, path):
                return
            refuse_existing(path)
            raise
        if error.errno not in NO_HARD_LINKS:
            raise
        refuse_existing(path)
        os.rename(temporary, path)


def unlink(path: str) -> None:
    """Remove a file, a link or an empty folder."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        os.rmdir(path)


def flush(folder: str) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # So say file systems whose folders cannot be flushed, and need not be.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
