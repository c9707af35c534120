"""Bringing: foreign checkpoints made into a run folder, and what tells how to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sharded_phema.errors import TargetError
from sharded_phema.export import byte_count
from sharded_phema.folder import open_folder
from sharded_phema.importers.agreement import agreed
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.formats import find
from sharded_phema.importers.writing import Progress, write_run
from sharded_phema.store import Run, open_run

__all__ = ["import_run", "reading_of"]


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
    unit, found = find(Path(source), format, wish)
    for sentence in dict.fromkeys(sentence for one in found for sentence in one.assumed):
        assumed(sentence)
    folder = open_folder(out)
    write_run(folder, found, agreed(found, wish.copy), unit, known, progress)
    return open_run(folder)


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
