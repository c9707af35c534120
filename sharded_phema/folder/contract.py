"""What a folder of a run can do, wherever it lies, and the names and ranges that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from numpy.typing import NDArray

from sharded_phema.errors import StoreError

__all__ = ["Buffer", "Entry", "Folder", "OpenFile", "Want", "bytes_of", "check_name", "is_name"]

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]
"""Contiguous memory."""


@dataclass(frozen=True, slots=True)
class Want:
    """Bytes of a file that are wanted in memory.

    Attributes:
        name: The file.
        begin: First byte; where the range ends, the size of ``out`` says.
        out: Contiguous and writable. An empty one asks for nothing, so that its file is not looked at.

    Raises:
        StoreError: The range begins before the file.
    """

    name: str
    begin: int
    out: bytearray | memoryview | NDArray[Any]

    def __post_init__(self) -> None:
        if self.begin < 0:
            raise StoreError(
                f"{self.name!r}: expected a range of bytes, found one that begins at {self.begin}",
                hint="the record that places it was damaged or edited; restore it from a backup",
            )


@dataclass(frozen=True, slots=True)
class Entry:
    """A direct child of a folder: its name there, its bytes (0 for a folder), and whether it is a folder."""

    name: str
    size: int
    is_folder: bool


class OpenFile(Protocol):
    """A file that is read from front to back. Used by one thread at a time."""

    def fill(self, begin: int, view: memoryview) -> None:
        """Fill memory with its bytes from ``begin`` on.

        Raises:
            StoreError: It is missing, ends before the range, or cannot be read.
        """

    def close(self) -> None:
        """Give back what reading it took. Closing twice is harmless."""


class Folder(Protocol):
    """A folder of files that are written once. May be used from several threads, and sent to other processes.

    A name is a relative path with ``/`` between its parts. A name that leads out of the
    folder is refused before anything is touched. Every failure of the storage is a ``StoreError`` that
    says which file, why, and the mend.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages: what ``open_folder`` takes, less a password."""

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file.

        Args:
            name: The file.
            limit: More bytes than this are refused, before they are read.

        Raises:
            StoreError: The file is missing, larger than ``limit``, or cannot be read.
        """

    def fill(self, wants: Sequence[Want]) -> None:
        """Read ranges of bytes into memory; several are in flight where the storage is remote.

        Raises:
            StoreError: A file is missing, ends before the range, or cannot be read. Memory may be filled in part.
        """

    def open(self, name: str) -> OpenFile:
        """A file of which many ranges will be read, one after another.

        Raises:
            StoreError: It is missing or cannot be opened; where the storage is remote, its first ``fill`` tells.
        """

    def write(self, name: str, pieces: Iterable[Buffer]) -> int:
        """A new file, whole or not at all, and safe when this returns.

        Args:
            name: The file. Folders on its way are made.
            pieces: Its bytes in order, taken one by one. What this raises passes through; the file is not written.

        Returns:
            Number of bytes.

        Raises:
            StoreError: The file exists already, or cannot be written. Nothing of it stays.
        """

    def list(self, folder: str) -> tuple[Entry, ...]:
        """Direct children by name, temporary files among them; none where there is no such folder.

        Args:
            folder: Its name; empty for all of this one.
        """

    def remove(self, name: str) -> None:
        """Remove one file or one empty folder, for good when this returns; nothing is done if there is none.

        Raises:
            StoreError: A folder that is not empty, or something that cannot be removed.
        """

    def clean(self, folder: str, *, older_than_s: float) -> tuple[str, ...]:
        """Remove what writers that were killed left behind in a folder and below it.

        Args:
            folder: Its name; empty for all of this one.
            older_than_s: Seconds since the last change, beyond which a writer may be taken for dead wherever it ran.

        Returns:
            Names of what was removed.
        """


def check_name(name: str) -> None:
    """Prove that a name stays inside of its folder and can be printed.

    Raises:
        StoreError: It is absolute, has parts that are empty, ``.`` or ``..``, or holds backslashes or control
            characters.
    """
    if not is_name(name):
        raise StoreError(
            f"expected the name of a file inside of the run folder, found {name!r}",
            hint="the record that names it was damaged or edited; restore it from a backup",
        )


def is_name(name: str) -> bool:
    """Whether ``check_name`` takes it."""
    return name.isprintable() and "\\" not in name and {"", ".", ".."}.isdisjoint(name.split("/"))


def bytes_of(buffer: Buffer) -> memoryview:
    """Memory as bytes, without a copy."""
    view = memoryview(cast(memoryview, buffer))  # arrays are typed as buffers from Python 3.12 on
    # What has no bytes cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
