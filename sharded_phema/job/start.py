"""Start of a job: begun, continued, or begun anew in the place of another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError
from sharded_phema.job.place import check_free, failing, is_ours, mend
from sharded_phema.job.records import Record, chain, difference, lay_out, parse, sweep
from sharded_phema.job.shared import Job

__all__ = ["begin"]


def begin(
    out: Path,
    request: Mapping[str, Any],
    coefficients: NDArray[np.float64],
    blocks: int,
    create: Callable[[Path], None],
    *,
    force: bool = False,
) -> Job:
    """Begin to make an output, or go on with what others began, at the same moment or before they died.

    Args:
        out: What the output becomes: nothing yet, or an empty folder. A link stays, and what it leads to is made.
        request: JSON data: all that determines the bytes of the output, except coefficients.
        coefficients: Finite. Where others began, theirs are used: machines may differ in the last bits.
        blocks: Number of blocks of work.
        create: Lays out the files in the folder that it is given.
        force: Replace rebuilt averages that stand there, once the new ones are whole; and a job that makes anything
            else there, at once.

    Raises:
        OutputError: Something stands there, or is being made there from another request, or nothing can be made there.
    """
    out = Path(os.path.realpath(out))
    partial = out.parent / f".{out.name}.partial"
    wanted = Record(json.loads(json.dumps(request)), blocks, np.asarray(coefficients, np.float64))
    with failing(out):
        while True:
            mend(out)
            name, texts = chain(partial)
            job = _found(texts, wanted, out, partial, force)
            if job and not job.standing():
                if job.is_placed() and force and is_ours(out):
                    return job  # only what is left of it is still to be removed
                if job.is_placed():
                    job.discard()
                job = None
            check_free(out, force=force)
            if job:
                sweep(partial)
                job.take_back()
                return job
            # Whoever comes first: what all go on with is what the next round finds.
            lay_out(partial, name, wanted, create)


def _found(texts: list[bytes], wanted: Record, out: Path, partial: Path, force: bool) -> Job | None:
    """The job of the last record; None if there is none, or if with force it is to be replaced."""
    try:
        for text in texts[-1:]:
            record = parse(text, partial / "job.json")
            if differs := difference(record, wanted):
                raise OutputError(
                    f"{partial} is there to make something else: it has {differs}",
                    hint="finish that with the command that began it; or remove the folder, or begin anew with --force",
                )
            return Job(out, partial / record.work / "files", record.blocks, record.coefficients, record.inode, force)
    except OutputError:
        if not force:
            raise
    return None
