"""Job: one rebuild that is to be measured, and the report that each of its processes leaves. Needs no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from meter import Meter, resident_mib

__all__ = ["Job", "Range", "Way", "done"]

Metric: TypeAlias = Literal["trajectory", "density", "paper"]
Range: TypeAlias = tuple[str, int, int]
"""A file, and the first and last byte of a run of bytes in it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One rebuild.

    Attributes:
        way: Which, as the scripts of this folder know them.
        root: Run folder.
        rival: Folder with the same averages as another library keeps them, for the ways that read those.
        out: Folder to make.
        targets: Widths.
        sigma_rels: Widths that the run stores.
        dtype: What is written.
        output_bytes: Of the numbers of one target.
        memory: Budget of a worker, where ``reconstruct`` takes one.
        metric: Of the fit of the classic ways, as ``sharded_phema.fit.fit`` takes it.
        together: Targets that the classic ways sum in one pass.
        workers: Processes that share the work.
        cores: Which each of them is held to, its own; 0 for no limit.
        ranges: What the plan reads, for the bare ways: files, and their first and last bytes.
        scratch: Folder where workers meet and leave their reports.
    """

    way: str
    root: str
    rival: str
    out: str
    targets: tuple[str, ...]
    sigma_rels: tuple[float, ...]
    dtype: str
    output_bytes: int
    memory: str
    metric: Metric
    together: int
    workers: int
    cores: int
    ranges: tuple[Range, ...]
    scratch: str


Way: TypeAlias = Callable[[Job, int, Meter], None]
"""Does one worker's part of a job, by its number, and has the meter count what belongs to it."""


def done(ways: Mapping[str, Way]) -> None:
    """Do what the command line says, JOB.json and a worker's number, and leave a report."""
    given: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    lists: dict[str, Any] = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    job, worker = Job(**(given | lists)), int(sys.argv[2])
    imported, meter = resident_mib("VmRSS"), Meter()
    ways[job.way](job, worker, meter)
    memory = {"peak (MiB)": resident_mib("VmHWM"), "imported (MiB)": imported}
    text = json.dumps({key: value for key, value in asdict(meter).items() if not key.startswith("_")} | memory)
    (Path(job.scratch) / f"{worker}.json").write_text(text)
