"""Records of a partial folder: what is made in it, and who may say so when several processes would at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2s
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError, StoreError
from sharded_phema.folder.disk import flush, make_folders
from sharded_phema.folder.local import LocalFolder
from sharded_phema.folder.temporary import temporary_name, writer_of
from sharded_phema.job.place import flush_tree, names
from sharded_phema.seal import sealed, unsealed

__all__ = ["Record", "chain", "difference", "lay_out", "parse", "sweep"]

SAME = 1e-6
"""How far coefficients of two machines may lie apart, relative to the largest."""

OLD_S = 86400.0
"""Age from which on a process elsewhere that left something is taken for dead."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a partial folder says of its job.

    Attributes:
        request: JSON data: all that determines the bytes of the output, except coefficients.
        blocks: Number of blocks of work.
        coefficients: float64, of any shape.
        work: Name of the folder of work.
        inode: Of ``files`` in it, wherever that is moved.
    """

    request: Any
    blocks: int
    coefficients: NDArray[np.float64]
    work: str = ""
    inode: int = 0

    def sealed(self) -> bytes:
        """The record as it is written. JSON carries every finite float64 exactly."""
        values = {"shape": self.coefficients.shape, "coefficients": self.coefficients.ravel().tolist()}
        own = {"work": self.work, "inode": self.inode}
        return sealed({"request": self.request, "blocks": self.blocks, **values, **own})


def parse(text: bytes, where: Path) -> Record:
    """The record in a text.

    Raises:
        OutputError: It is damaged.
    """
    try:
        data = unsealed(text, where)
        coefficients = np.array(data["coefficients"], np.float64).reshape(data["shape"])
        return Record(data["request"], data["blocks"], coefficients, data["work"], data["inode"])
    except (StoreError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{where}: the record of what is made there is damaged: {getattr(error, 'message', error)}",
            hint=f"begin anew with --force, or remove {where.parent}",
        ) from error


def chain(partial: Path) -> tuple[str, list[bytes]]:
    """Texts of all records, each of which replaces the one before it, and the name that the next one would take.

    The next name derives from the last text, so that of several processes which would replace the same record one
    succeeds, and none replaces another record than the one that it saw.
    """
    name, texts = "job.json", []
    while True:
        try:
            texts.append((partial / name).read_bytes())
        except FileNotFoundError:
            return name, texts
        name = f"job.{blake2s(texts[-1], digest_size=8).hexdigest()}.json"


def difference(found: Record, wanted: Record) -> str:
    """The first thing in which two jobs differ, in words; empty if they make the same."""
    for key, left, right in _differing("", found.request, wanted.request):
        # A request may be long, and so may a value in it.
        return f"{key or 'request'} {left:.80} there, {right:.80} here"
    shapes = (found.blocks, *found.coefficients.shape), (wanted.blocks, *wanted.coefficients.shape)
    if shapes[0] != shapes[1]:
        return f"number of blocks and shape of coefficients {shapes[0]} there, {shapes[1]} here"
    apart = float(np.abs(found.coefficients - wanted.coefficients).max(initial=0.0))
    largest = float(np.abs(found.coefficients).max(initial=0.0))
    if not apart <= SAME * largest:
        return f"coefficients that lie {apart:.2g} apart, more than {SAME:g} of the largest, {largest:.2g}"
    return ""


def lay_out(partial: Path, name: str, record: Record, create: Callable[[Path], None]) -> None:
    """Make a folder of work and record it; another's record of that name, if it was first, stays.

    Everything is on disk before the record is.
    """
    for made in make_folders(str(partial)):
        flush(os.path.dirname(made))
    work = partial / temporary_name("work")
    recorded = False
    try:
        os.makedirs(work / "files")
        create(work / "files")
        os.mkdir(work / "done")
        flush_tree(work)
        flush(str(partial))
        whole = replace(record, work=work.name, inode=os.stat(work / "files").st_ino)
        recorded = _write(partial, name, whole.sealed())
    except FileNotFoundError:
        # With a job that ended meanwhile all of its partial folder went, this too: the caller looks again.
        if work.exists() or not partial.parent.is_dir():
            raise
    finally:
        if not recorded:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # others are in it
                partial.rmdir()


def sweep(partial: Path) -> None:
    """Remove what dead processes left, and the work of jobs that were replaced."""
    # Looked for before the records are read: what the dead ones recorded is seen then.
    left = {name for name in names(partial) if _is_left(partial / name)}
    works = []
    for text in chain(partial)[1]:
        with suppress(OutputError):
            works.append(parse(text, partial).work)
    for name in (left | {*works[:-1]}) - {*works[-1:]}:
        path = partial / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write(partial: Path, name: str, text: bytes) -> bool:
    try:
        LocalFolder(str(partial), str(partial)).write(name, [text])
    except StoreError as error:
        if (partial / name).exists():
            return False
        raise error.__cause__ or error from None
    return True


def _is_left(path: Path) -> bool:
    writer = writer_of(path.name)
    with suppress(FileNotFoundError):
        return writer is not None and (writer.is_dead or time.time() - path.lstat().st_mtime > OLD_S)
    return False


def _differing(key: str, left: Any, right: Any) -> list[tuple[str, str, str]]:
    """Paths and JSON texts of the innermost values in which two pieces of JSON data differ."""
    texts = [json.dumps(side, sort_keys=True) for side in (left, right)]
    if texts[0] == texts[1]:
        return []
    if isinstance(left, dict) and isinstance(right, dict):
        sides = [(f"{key}.{name}".lstrip("."), left.get(name), right.get(name)) for name in sorted({**left, **right})]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        sides = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip(left, right, strict=True))]
    else:
        return [(key, texts[0], texts[1])]
    # A member that is null on one side and missing on the other is found in no pair.
    return [found for side in sides for found in _differing(*side)] or [(key, texts[0], texts[1])]
