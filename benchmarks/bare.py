"""Bare ways: the bytes that a plan needs, and as many as its outputs have, moved and not looked at. Needs no torch.

python benchmarks/bare.py JOB.json WORKER
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from jobs import Job, Range, Way, done
from meter import Meter

__all__ = ["BARE"]

BUFFER = 1 << 20


def bare_read(job: Job, worker: int, meter: Meter) -> None:
    """The bytes that the plan needs, read into one buffer; which they are is told."""
    with meter:
        _read(job.ranges)


def bare_copy(job: Job, worker: int, meter: Meter) -> None:
    """The same, and as many bytes written and flushed as the outputs have."""
    Path(job.out).mkdir()
    with meter:
        _read(job.ranges)
        for number, _ in enumerate(job.targets):
            _write(Path(job.out) / f"{number}.bytes", job.output_bytes)


BARE: dict[str, Way] = {"bare read": bare_read, "bare read and write": bare_copy}


def _read(ranges: Sequence[Range]) -> None:
    buffer = memoryview(bytearray(BUFFER))
    for path, several in groupby(ranges, key=lambda one: one[0]):
        descriptor = os.open(path, os.O_RDONLY)
        for _, begin, end in several:
            while begin < end:
                begin += os.preadv(descriptor, [buffer[: end - begin]], begin)
        os.close(descriptor)


def _write(path: Path, size: int) -> None:
    buffer = memoryview(bytearray(BUFFER))
    with path.open("wb", buffering=0) as file:
        while size:
            size -= file.write(buffer[:size])
        os.fsync(file.fileno())


if __name__ == "__main__":
    done(BARE)
