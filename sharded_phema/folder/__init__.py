"""The folder that a run lies in, on a local disk or behind any URL that fsspec opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from sharded_phema.folder.contract import Buffer, Entry, Folder, OpenFile, Want
from sharded_phema.folder.flight import in_flight
from sharded_phema.folder.local import LocalFolder

__all__ = [
    "Buffer",
    "Entry",
    "Folder",
    "OpenFile",
    "Want",
    "is_local",
    "is_there",
    "of_each",
    "open_folder",
    "read_each",
]

LOCAL = ("file://", "local://")

Item = TypeVar("Item")
Found = TypeVar("Found")


def open_folder(root: str | os.PathLike[str]) -> Folder:
    """The folder at a path or URL, whether it exists or not. Nothing is read or made.

    Args:
        root: A path, which a later change of the working directory does not move, or a URL: ``file:///data/run``,
            ``memory://run``, ``s3://bucket/run``, and any other that fsspec opens.

    Raises:
        StoreError: A package that the URL needs is missing, or its protocol is unknown.
    """
    url = os.fspath(root)
    for prefix in LOCAL:
        if url.startswith(prefix):
            return LocalFolder(url, os.path.abspath(url.removeprefix(prefix)))
    if "://" not in url:
        return LocalFolder(url, os.path.abspath(url))
    from sharded_phema.folder.remote import RemoteFolder

    return RemoteFolder(url)


def is_there(folder: Folder, name: str) -> bool:
    """Whether a folder holds a file or folder of that name."""
    parent, _, base = name.rpartition("/")
    return any(entry.name == base for entry in folder.list(parent))


def read_each(folder: Folder, names: Sequence[str], limit: int) -> tuple[bytes, ...]:
    """Whole small files, several in flight: records by the thousand are not waited for one by one.

    Args:
        folder: Where they are.
        names: The files.
        limit: Bytes that each may have.

    Raises:
        StoreError: One of them is missing, larger, or cannot be read.
    """
    return in_flight(lambda name: folder.read(name, limit), names)


def is_local(folder: Folder) -> bool:
    """Whether reading from it waits for a disk rather than for a network."""
    return "://" not in folder.url or folder.url.startswith(LOCAL)


def of_each(folder: Folder, act: Callable[[Item], Found], items: Sequence[Item]) -> tuple[Found, ...]:
    """``act`` of each item, in order: several at a time where each waits for a remote folder, else one after another.

    Args:
        folder: What ``act`` reads from.
        act: Reads something. May be called from several threads.
        items: What it is called with.

    Raises:
        StoreError: The first failure of ``act``.
    """
    if is_local(folder):
        return tuple(act(item) for item in items)
    return in_flight(act, items)
