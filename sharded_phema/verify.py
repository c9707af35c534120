"""Verification: every byte of a run folder against the digests that its records hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.folder import Folder, is_there, open_folder
from sharded_phema.folder.contract import is_name
from sharded_phema.folder.temporary import writer_of
from sharded_phema.store import Damaged, Run, Snapshot, check_claim, check_frozen, check_layout, check_session, open_run

__all__ = ["Report", "verify"]

Check = tuple[str, Callable[[], object]]

_KNOWN = {
    "claims": re.compile(r"claims/[0-9]+\.json"),
    "layouts": re.compile(r"layouts/[^/]+\.json"),
    "sessions": re.compile(r"sessions/[^/]+\.json"),
    "stores": re.compile(r"frozen/[^/]+/rank-[0-9]{5,}\.json"),
}
_RECORDS = {"claims": check_claim, "layouts": check_layout, "sessions": check_session}
_TENSORS = re.compile(r".*/rank-[0-9]{5,}\.safetensors")


@dataclass(frozen=True, slots=True)
class Report:
    """What a run folder holds, byte for byte.

    Attributes:
        root: The run folder.
        snapshots: How many snapshots there are, abandoned and damaged ones among them.
        files: How many files were read whole.
        size: Their bytes.
        damaged: Files that are not what was written, or are missing, and snapshots whose records contradict others.
        extra: Files that no record names and no writer of this run leaves behind.
        left_over: What writers that were killed leave behind: temporary files, parts of snapshots and stores that
            were never committed. No reader looks at them, and they are no fault of a run.
    """

    root: str
    snapshots: int
    files: int
    size: int
    damaged: tuple[Damaged, ...]
    extra: tuple[str, ...]
    left_over: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether everything is as it was written, and nothing else lies there."""
        return not (self.damaged or self.extra)


def verify(
    root: str | os.PathLike[str] | Folder, *, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Report:
    """Read all files of a run, and compare every block with its digest. Changes nothing.

    A run that trains meanwhile may be verified: what appears or goes while this reads is not looked at.

    Args:
        root: Path or URL of the run folder, or the folder.
        progress: Wraps the checks of single files, to draw a bar.

    Raises:
        StoreError: There is no run, or its own record, a session's, or how sessions continue each other is damaged:
            nothing else can be judged then.
    """
    folder = open_folder(root) if isinstance(root, str | os.PathLike) else root
    run = open_run(folder)
    checks = _Checks(run, dict(_walk(folder, "")))
    for _ in progress(checks):
        pass
    return checks.report()


class _Checks(Iterable[None]):
    """The checks of a folder; iterating makes them, one file after another."""

    def __init__(self, run: Run, files: Mapping[str, int]) -> None:
        self._run, self._sizes = run, files
        self._shelf = sorted((*run.snapshots, *run.abandoned), key=lambda snapshot: snapshot.name)
        self._named = {"run.json"}
        self._done = set(self._named)  # read when the run was opened
        self._done |= {f"{snapshot.name}/snapshot.json" for snapshot in self._shelf}
        self._damaged = [*run.damaged]
        # Those that lie there, and those that snapshots refer to.
        self._stores = sorted({*self._matching("stores"), *(name for s in self._shelf for name in s.stores())})

    def __len__(self) -> int:
        parts = sum(bool(part.size) for snapshot in self._shelf for part in snapshot.facts.parts)
        return parts + sum(len(self._matching(kind)) for kind in _RECORDS) + len(self._stores)

    def __iter__(self) -> Iterator[None]:
        for snapshot in self._shelf:
            self._named |= {f"{snapshot.name}/snapshot.json"}
            yield from self._each(snapshot.checks(), partial(_is_gone, snapshot))
        folder, record = self._run.root, self._run.record
        for kind, check in _RECORDS.items():
            found = self._matching(kind)
            yield from self._each([(name, partial(check, folder, record, name)) for name in found], _never)
        for name in self._stores:
            tensors = name.removesuffix(".json") + ".safetensors"
            self._named.add(tensors)
            yield from self._each([(name, partial(check_frozen, self._run, name))], _never)
            self._done |= {tensors} & {*self._sizes}

    def report(self) -> Report:
        """What was found."""
        # Of a snapshot whose record cannot be believed, nothing tells which files belong to it.
        set_aside = {damaged.name for damaged in self._run.damaged}
        rest = [n for n in self._sizes if n not in self._named and n.rpartition("/")[0] not in set_aside]
        left = [name for name in rest if self._is_left(name)]
        read = [name for name in self._done if name in self._sizes]
        return Report(
            self._run.root.url,
            len(self._shelf) + len(self._run.damaged),
            len(read),
            sum(self._sizes[name] for name in read),
            tuple(self._damaged),
            tuple(sorted({*rest} - {*left})),
            tuple(sorted(left)),
        )

    def _each(self, checks: Iterable[Check], is_gone: Callable[[], bool]) -> Iterator[None]:
        for name, check in checks:
            self._named.add(name)
            try:
                check()
            except StoreError as error:
                if not is_gone():
                    self._damaged.append(Damaged(name, error.message))
            if name in self._sizes:
                self._done.add(name)
            yield

    def _matching(self, kind: str) -> list[str]:
        return sorted(name for name in self._sizes if _KNOWN[kind].fullmatch(name))

    def _is_left(self, name: str) -> bool:
        parent, _, base = name.rpartition("/")
        unfinished = parent in self._run.unfinished or parent.startswith("frozen/")
        return writer_of(base) is not None or (unfinished and _TENSORS.fullmatch(name) is not None)


def _never() -> bool:
    return False


def _is_gone(snapshot: Snapshot) -> bool:
    """Whether a snapshot was removed meanwhile, as retention does while a run trains."""
    return not is_there(snapshot.root, f"{snapshot.name}/snapshot.json")


def _walk(folder: Folder, under: str) -> Iterator[tuple[str, int]]:
    """Every file of a folder, and its bytes."""
    for entry in folder.list(under):
        name = f"{under}/{entry.name}" if under else entry.name
        if entry.is_folder and is_name(name):
            yield from _walk(folder, name)
        else:
            yield name, entry.size
