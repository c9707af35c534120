"""Bringing: foreign checkpoints made into a run, for good or for as long as one reconstruction takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sharded_phema.errors import StoreError, TargetError
from sharded_phema.export import byte_count
from sharded_phema.folder import open_folder
from sharded_phema.importers.agreement import agreed
from sharded_phema.importers.contract import Foreign, Reading
from sharded_phema.importers.formats import FORMATS, format_of
from sharded_phema.importers.writing import Progress, write_run
from sharded_phema.store import Run, open_run

__all__ = ["brought", "import_run", "reading_of"]


def import_run(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "",
    reading: Reading | None = None,
    memory: str | int = "1GiB",
    progress: Progress = lambda sizes, steps: steps,
    assumed: Callable[[str], object] = lambda sentence: None,
) -> Run:
    """Bring a run of another package into a run folder, each stored average with what it really is.

    Nothing that lies on disk is executed. An import that was interrupted leaves no run; called again alike it goes on.

    Args:
        source: Folder of the checkpoints, or one file.
        out: Run folder to make, a path or URL.
        format: A key of ``FORMATS``; empty for the one that the folder looks like.
        reading: What the files do not tell.
        memory: Limit of the tensors that are held at a time; a snapshot is stored in parts that fit it.
        progress: Is given the bytes that each step moves, and the steps.
        assumed: Is told each thing that the files do not tell and that was assumed.

    Raises:
        StoreError: The source is not of the format, damaged, or asks for code to be run.
        ModelMismatch: The checkpoints are of several models.
        OutputError: Something lies at ``out``.
        OrderError: Another process imports into the folder.
    """
    known, wish = byte_count(memory), reading or Reading()
    name, found = _found(Path(source), format, wish)
    for sentence in dict.fromkeys(sentence for one in found for sentence in one.assumed):
        assumed(sentence)
    folder = open_folder(out)
    unit = wish.unit or ("images" if name == "edm2" else "steps")
    write_run(folder, found, agreed(found, wish.copy), unit, known, progress)
    return open_run(folder)


@contextmanager
def brought(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "",
    reading: Reading | None = None,
    memory: str | int = "1GiB",
    progress: Progress = lambda sizes, steps: steps,
) -> Iterator[str]:
    """A run folder of foreign checkpoints beside an output, removed at the end, also after a failure.

    Args:
        source: As of ``import_run``.
        out: The output beside which it is made.
        format: As of ``import_run``.
        reading: As of ``import_run``.
        memory: As of ``import_run``.
        progress: As of ``import_run``.

    Raises:
        PhemaError: As of ``import_run``.
    """
    beside = Path(os.path.abspath(out)).parent
    beside.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{Path(out).name}-import-", dir=beside)
    try:
        import_run(source, folder, format=format, reading=reading, memory=memory, progress=progress)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # made here, under a name that nothing else has


def reading_of(words: Sequence[str]) -> Reading:
    """How to read, from words such as ``start=100`` and ``profile=0.05``, spelled as the options of ``import``.

    Raises:
        TargetError: A word is none.
    """
    several: dict[str, list[str]] = {"profile": [], "copy": []}
    texts, numbers = {"unit", "time-pattern", "key", "prefix"}, {"start", "update-every"}
    facts: dict[str, object] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in several:
            several[name].append(value)
        elif name in texts:
            facts[name.replace("-", "_")] = value
        elif name in numbers and _number(value) is not None:
            facts[name.replace("-", "_")] = _number(value)
        else:
            known = ", ".join(sorted({*several, *texts, *numbers}))
            raise TargetError(f"--reading {word!r}: expected NAME=VALUE with one of {known}", hint="such as start=100")
    return Reading(tuple(several["profile"]), copy=tuple(several["copy"]), **facts)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _found(source: Path, format: str, reading: Reading) -> tuple[str, list[Foreign]]:
    if not source.exists():
        raise StoreError(f"{source}: there is nothing", hint="give the folder in which the checkpoints lie")
    name = format or format_of(source)
    if name not in FORMATS:
        raise StoreError(f"--from {name}: unknown format", hint=f"there are {', '.join(FORMATS)}")
    return name, sorted(FORMATS[name](source, reading), key=lambda one: one.t)
