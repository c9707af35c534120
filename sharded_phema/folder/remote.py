"""A folder behind a URL, through fsspec: object stores above all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.folder.contract import Buffer, Entry, OpenFile, Want, bytes_of, check_name
from sharded_phema.folder.flight import in_flight

__all__ = ["RemoteFolder"]

UPLOAD_BYTES = 32 << 20
"""Bytes of one part of an upload. S3 takes 10,000 parts, so that a file may have 312 GiB."""

REQUEST_BYTES = 8 << 20
"""Bytes that one request asks for: enough to be worth its wait, and small beside what many in flight may hold."""


class RemoteFolder:
    """A folder by its URL; see ``Folder`` for what its methods promise.

    There is no rename: on an object store a file appears, whole, when its upload is complete. File
    systems that show a file while it grows (``memory://``, ``sftp://``) may show a part of one whose writer was
    killed. A file that exists is refused before the upload; two writers of one name at the same moment are
    told apart by the records of a run, not here.

    Credentials and endpoints are those that fsspec finds: the protocol's own variables (such as ``AWS_PROFILE``
    and ``AWS_ENDPOINT_URL``), fsspec's (``FSSPEC_S3_ENDPOINT_URL``), and its configuration files.

    Args:
        url: Anything that fsspec opens.

    Raises:
        StoreError: fsspec or the package of the protocol is missing, or fsspec does not know the protocol.
    """

    __slots__ = ("_given", "_held", "url")

    def __init__(self, url: str) -> None:
        self.url = re.sub(r"://([^/@:]*):[^/@]*@", r"://\1:***@", url)
        self._given = url
        self._held = (os.getpid(), *_connect(url, self.url))

    def __reduce__(self) -> tuple[object, ...]:
        return RemoteFolder, (self._given,)

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file, in one request."""
        fs, path = self._at(name)
        try:
            data: bytes = fs.cat_file(path, start=0, end=limit + 1)
        except Exception as error:
            # An empty file has no first byte that could be asked for.
            if self._size(name) == 0:
                return b""
            raise self._failure(name, "read", error) from error
        if len(data) > limit:
            raise StoreError(
                f"{self._where(name)}: expected at most {limit} bytes, found more",
                hint="the file is damaged or no record of a run; restore it from a backup",
            )
        return bytes(data)

    def fill(self, wants: Sequence[Want]) -> None:
        """Read ranges of bytes into memory, in requests of which several are in flight."""
        requests = []
        for want in wants:
            view = bytes_of(want.out)
            for begin in range(0, len(view), REQUEST_BYTES):
                requests.append((want.name, want.begin + begin, view[begin : begin + REQUEST_BYTES]))
        in_flight(lambda request: self._fetch(*request), requests)

    def open(self, name: str) -> OpenFile:
        """A file by its name: every ``fill`` asks anew, in requests of which several are in flight."""
        return _RemoteFile(self, name)

    def write(self, name: str, pieces: Iterable[Buffer]) -> int:
        """A new file, sent part by part; nothing of it stays if that fails."""
        fs, path = self._at(name)
        if self._info(name):
            raise StoreError(
                f"{self._where(name)}: exists already, and no file is ever replaced", hint="use another run folder"
            )
        with self._failing(name, "written"):
            file = fs.open(path, "wb", block_size=UPLOAD_BYTES)
        size = 0
        try:
            for piece in pieces:
                view = bytes_of(piece)
                for begin in range(0, len(view), UPLOAD_BYTES):
                    with self._failing(name, "written"):
                        file.write(view[begin : begin + UPLOAD_BYTES])
                size += len(view)
            with self._failing(name, "written"):
                file.close()
        except BaseException:
            _abandon(fs, path, file)
            raise
        return size

    def list(self, folder: str) -> tuple[Entry, ...]:
        """Direct children by name, as the storage has them now."""
        fs, path = self._at(folder) if folder else self._root()
        with self._failing(folder, "listed"):
            try:
                found = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return ()
        # A store may list the folder itself, as a file of that name or as a mark that keeps an empty one.
        children = [child for child in found if child["name"].strip("/") != path.strip("/")]
        return tuple(sorted((_entry(child) for child in children), key=lambda entry: entry.name))

    def remove(self, name: str) -> None:
        """Remove one file or one empty folder, which many stores have no longer once its last file is gone."""
        fs, path = self._at(name)
        info = self._info(name)
        if info.get("type") == "directory" and (children := self.list(name)):
            raise StoreError(
                f"{self._where(name)}: cannot be removed: it holds {len(children)} files and folders",
                hint="remove them first",
            )
        with self._failing(name, "removed"), suppress(FileNotFoundError):
            if info.get("type") == "directory":
                fs.rmdir(path)
            elif info:
                fs.rm_file(path)

    def clean(self, folder: str, *, older_than_s: float) -> tuple[str, ...]:
        """Nothing: no temporary files are made.

        Parts of an upload whose writer was killed are invisible, and cost money: have the bucket abort incomplete
        uploads after some days.
        """
        return ()

    def _root(self) -> tuple[Any, str]:
        """The file system, without what it remembers of listings, and the path of the folder there."""
        if self._held[0] != os.getpid():
            # Connections do not survive a fork.
            self._held = (os.getpid(), *_connect(self._given, self.url))
        _, fs, root = self._held
        fs.invalidate_cache()
        return fs, root

    def _at(self, name: str) -> tuple[Any, str]:
        """The same, and the path of something in the folder."""
        check_name(name)
        fs, root = self._root()
        return fs, f"{root.rstrip('/')}/{name}"

    def _where(self, name: str) -> str:
        return f"{self.url}{'' if self.url.endswith('/') else '/'}{name}" if name else self.url

    def _info(self, name: str) -> dict[str, Any]:
        """What the storage says of a file or folder; empty if there is none."""
        fs, path = self._at(name)
        with self._failing(name, "looked at"):
            try:
                return dict(fs.info(path))
            except (FileNotFoundError, NotADirectoryError):
                return {}

    def _size(self, name: str) -> int:
        info = self._info(name)
        if info.get("type") != "file":
            raise StoreError(
                f"{self._where(name)}: expected a file, found {'a folder' if info else 'none'}",
                hint="restore it from a backup, or leave out what needs it",
            )
        return int(info["size"])

    def _fetch(self, name: str, begin: int, view: memoryview) -> None:
        fs, path = self._at(name)
        end = begin + len(view)
        try:
            data = fs.cat_file(path, start=begin, end=end)
        except Exception as error:
            if (size := self._size(name)) < end:
                raise self._short(name, end, size) from error
            raise self._failure(name, "read", error) from error
        if len(data) != len(view):
            raise self._short(name, end, self._size(name))
        view[:] = data

    def _short(self, name: str, end: int, size: int) -> StoreError:
        return StoreError(
            f"{self._where(name)}: expected {end} bytes or more, found {size}",
            hint="the file was cut short; restore it from a backup, or leave out what needs it",
        )

    @contextmanager
    def _failing(self, name: str, act: str) -> Iterator[None]:
        """Turn what the storage reports, which may be any exception, into one error."""
        try:
            yield
        except Exception as error:
            raise self._failure(name, act, error) from error

    def _failure(self, name: str, act: str, error: Exception) -> StoreError:
        intact = "; earlier snapshots are intact" if act == "written" else ""
        return StoreError(
            f"{self._where(name)}: cannot be {act}: {type(error).__name__}: {error}",
            hint=f"check the address, the credentials and the connection{intact}",
        )


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    folder: RemoteFolder
    name: str

    def fill(self, begin: int, view: memoryview) -> None:
        self.folder.fill([Want(self.name, begin, view)])

    def close(self) -> None:
        """Nothing is open."""


def _connect(url: str, shown: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL there."""
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as error:
        raise StoreError(
            f"{shown}: cannot be opened: {error}",
            hint="pip install 'sharded_phema[remote]' and the package of the protocol: s3fs for s3://, gcsfs for "
            "gs://, adlfs for abfs://",
        ) from error
    except Exception as error:
        raise StoreError(
            f"{shown}: cannot be opened: {error}",
            hint="give a path, or a URL that fsspec knows, such as s3://bucket/run",
        ) from error
    return fs, root


def _entry(info: dict[str, Any]) -> Entry:
    is_folder = info["type"] == "directory"
    return Entry(info["name"].rstrip("/").rsplit("/", 1)[-1], 0 if is_folder else int(info["size"]), is_folder)


def _abandon(fs: Any, path: str, file: Any) -> None:
    """Give a file up that was not sent whole."""
    from fsspec.spec import AbstractBufferedFile

    with suppress(Exception):
        if isinstance(file, AbstractBufferedFile):
            try:
                file.discard()
            finally:
                # Its destructor would close it otherwise, and so complete the upload.
                file.closed = True
        else:
            file.close()
            fs.rm_file(path)
