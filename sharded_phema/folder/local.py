"""A folder on a disk of this machine, or on one that is mounted like it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sharded_phema.errors import StoreError
from sharded_phema.folder.contract import Buffer, Entry, OpenFile, Want, bytes_of, check_name, is_name
from sharded_phema.folder.disk import (
    failing,
    fill_range,
    flush,
    give_name,
    make_folders,
    opened,
    pour,
    refuse_existing,
    unlink,
)
from sharded_phema.folder.local_file import LocalFile
from sharded_phema.folder.temporary import temporary_name, writer_of

__all__ = ["LocalFolder"]


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder by its path; see ``Folder`` for what its methods promise.

    Files get their names by a hard link, which never replaces another file. Where there are
    no hard links they are renamed after a look, so that there two writers of one name at the same moment are
    not told apart.

    Attributes:
        url: The path as it was given.
        root: The absolute path.
    """

    url: str
    root: str

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file."""
        path = self._resolved(name)
        with failing(path, "read"), opened(path) as (descriptor, size):
            if size > limit:
                raise StoreError(
                    f"{path}: expected at most {limit} bytes, found {size}",
                    hint="the file is damaged or no record of a run; restore it from a backup",
                )
            out = bytearray(size)
            fill_range(path, descriptor, size, 0, memoryview(out))
            return bytes(out)

    def fill(self, wants: Sequence[Want]) -> None:
        """Read ranges of bytes into memory, file by file."""
        files: dict[str, list[Want]] = {}
        for want in wants:
            files.setdefault(want.name, []).append(want)
        for name, ranges in files.items():
            views = [(want.begin, bytes_of(want.out)) for want in ranges]
            path = self._resolved(name)
            if any(view for _, view in views):
                with failing(path, "read"), opened(path) as (descriptor, size):
                    for begin, view in views:
                        fill_range(path, descriptor, size, begin, view)

    def open(self, name: str) -> OpenFile:
        """A file that stays open; what it will be asked for next is on its way from the disk meanwhile."""
        return LocalFile(self._resolved(name))

    def write(self, name: str, pieces: Iterable[Buffer]) -> int:
        """A new file, whole or not at all, and safe when this returns."""
        path = self._entry(name)
        with failing(path, "written"):
            refuse_existing(path)
            made = make_folders(os.path.dirname(path))
            temporary = os.path.join(os.path.dirname(path), temporary_name(os.path.basename(path)))
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        ours = [temporary]
        try:
            size = pour(descriptor, pieces, path)
            with failing(path, "written"):
                give_name(temporary, path)
                ours.append(path)
                with suppress(FileNotFoundError):  # it was renamed
                    os.unlink(temporary)
                self._flush_folders(os.path.dirname(path), made)
        except BaseException:
            for left in ours:
                with suppress(OSError):
                    os.unlink(left)
            raise
        return size

    def list(self, folder: str) -> tuple[Entry, ...]:
        """Direct children by name; links are listed as what they are, not as what they lead to."""
        path = self._resolved(folder) if folder else self.root
        entries = []
        with failing(path, "listed"):
            try:
                children = [*os.scandir(path)]
            except (FileNotFoundError, NotADirectoryError):
                return ()
            for child in children:
                with suppress(FileNotFoundError):  # removed since
                    is_folder = child.is_dir(follow_symlinks=False)
                    size = 0 if is_folder else child.stat(follow_symlinks=False).st_size
                    entries.append(Entry(child.name, size, is_folder))
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def remove(self, name: str) -> None:
        """Remove one file, one link or one empty folder."""
        path = self._entry(name)
        with failing(path, "removed"):
            try:
                unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            flush(os.path.dirname(path))

    def clean(self, folder: str, *, older_than_s: float) -> tuple[str, ...]:
        """Remove temporary files of writers that are dead.

        A file is removed if its name is exactly one that ``write`` gives, and if its writer provably runs no more or
        nothing changed the file for longer than ``older_than_s``. Death is provable only for
        processes of this machine since it was started, and of this container: all others' files are judged by age
        alone, so give an age that no living writer reaches, such as a day.
        """
        removed: list[str] = []
        for entry in self.list(folder):
            if not is_name(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_folder:
                removed += self.clean(name, older_than_s=older_than_s)
            elif self._is_left(name, entry.name, older_than_s):
                self.remove(name)
                removed.append(name)
        return tuple(removed)

    def _is_left(self, name: str, base: str, older_than_s: float) -> bool:
        writer, path = writer_of(base), self._entry(name)
        if writer is None:
            return False
        with failing(path, "looked at"):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                return False
        return stat.S_ISREG(status.st_mode) and (writer.is_dead or time.time() - status.st_mtime > older_than_s)

    def _resolved(self, name: str) -> str:
        """Path of what is read, all links followed."""
        check_name(name)
        base = os.path.realpath(self.root)
        return _inside(base, os.path.realpath(os.path.join(base, name)), name)

    def _entry(self, name: str) -> str:
        """Path of what is written or removed: links on the way are followed, and itself it may be a link."""
        check_name(name)
        base = os.path.realpath(self.root)
        parent, last = os.path.split(os.path.join(base, name))
        return os.path.join(_inside(base, os.path.realpath(parent), name), last)

    def _flush_folders(self, folder: str, made: Sequence[str]) -> None:
        """Have the names on the way to a new file on disk, up to that of the first folder that was there.

        Inside of the root all of them are flushed: another process may have made a folder and not have come to this.
        """
        base = os.path.realpath(self.root)
        flush(folder)
        while folder in made or folder.startswith(f"{base}/"):
            folder = os.path.dirname(folder)
            flush(folder)


def _inside(base: str, path: str, name: str) -> str:
    if os.path.commonpath([base, path]) != base:
        raise StoreError(
            f"{base}: {name!r} is a link that leads out of the folder, to {path}",
            hint="if the folder is yours, copy it with its links resolved (cp -rL) and use the copy",
        )
    return path
