"""Fresh processes: one way to rebuild, run apart from everything else, and what the system says that it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bare import BARE
from jobs import Job

__all__ = ["Trial", "ran", "read_all", "sent_to_disk"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Trial:
    """What one run of a way took.

    Attributes:
        seconds: From when all its processes had imported what they need, to the end of the last one's work.
        end_to_end_s: From the start of the processes to their end.
        peak_mib: Most memory that one of its processes had.
        imported_mib: Memory that it had before its work began.
        asked_bytes: What its processes asked the system to read, in their work (``rchar``).
        disk_read_bytes: What came from a disk.
        disk_written_bytes: What went to one.
    """

    seconds: float
    end_to_end_s: float
    peak_mib: float
    imported_mib: float
    asked_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int


def ran(job: Job, *, threads: int) -> Trial:
    """Run all workers of a job, and wait for them.

    Args:
        job: What to do; its scratch folder is made here.
        threads: Of torch in each process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(asdict(replace(job, scratch=scratch))))
        root = _HERE.resolve().parent
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
        command, began = (
            [sys.executable, str(_HERE / ("bare.py" if job.way in BARE else "ways.py")), str(path)],
            time.perf_counter(),
        )
        outputs = [Path(scratch) / f"{worker}.txt" for worker in range(job.workers)]
        workers = []
        for worker, output in enumerate(outputs):
            with output.open("wb") as file:
                given = [*_on_cores(job, worker), *command, str(worker)]
                workers.append(subprocess.Popen(given, env=environment, stdout=file, stderr=subprocess.STDOUT))
        _wait(workers)
        ended = time.perf_counter()
        if any(worker.returncode for worker in workers):
            raise RuntimeError(f"{job.way}: " + "\n".join(output.read_text()[-4000:] for output in outputs))
        reports = [json.loads((Path(scratch) / f"{worker}.json").read_text()) for worker in range(job.workers)]
    span = max(report["end"] for report in reports) - min(report["begin"] for report in reports)
    counts = [sum(r["counts"][name] for r in reports) for name in ("rchar", "read_bytes", "write_bytes")]
    peak, imported = (max(report[f"{kind} (MiB)"] for report in reports) for kind in ("peak", "imported"))
    # One process may have stopped its clock in between; several that work together do not.
    seconds = reports[0]["seconds"] if job.workers == 1 else span
    return Trial(seconds, ended - began, peak, imported, *counts)


def _on_cores(job: Job, worker: int) -> list[str]:
    """What holds a command to the cores of a worker."""
    if not job.cores:
        return []
    mine = sorted(os.sched_getaffinity(0))[worker * job.cores : (worker + 1) * job.cores]
    assert len(mine) == job.cores, f"{job.workers} workers of {job.cores} cores each need more than there are"
    return ["taskset", "--cpu-list", ",".join(map(str, mine))]


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all ended; where one failed, the others are not waited for."""
    while any(worker.poll() is None for worker in workers):
        if any(worker.returncode for worker in workers):
            for worker in workers:
                worker.kill()
        time.sleep(0.002)


def read_all(paths: Iterable[Path]) -> None:
    """Read files once, so that the system has them in memory, as far as they fit."""
    buffer = memoryview(bytearray(1 << 22))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def sent_to_disk(paths: Iterable[Path]) -> None:
    """Have the system forget what files hold, so that it is read from the disk; needs no rights."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
