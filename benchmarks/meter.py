"""Meter: seconds, bytes and memory of a piece of work, as the operating system counts them for this process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

__all__ = ["Meter", "resident_mib"]

_COUNTED = ("rchar", "read_bytes", "write_bytes")


@dataclass(slots=True)
class Meter:
    """Adds up what happens inside of its ``with`` blocks.

    Attributes:
        begin: When the first began, on the clock that all processes of the machine share (s).
        end: When the last ended (s).
        seconds: Inside of the blocks.
        counts: Of /proc/self/io inside of the blocks: ``rchar``, bytes that were asked of the system by calls (what is
            mapped into memory does not count); ``read_bytes`` and ``write_bytes``, what went to and from disks.
    """

    begin: float = 0.0
    end: float = 0.0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    _before: dict[str, int] = field(default_factory=dict)
    _began: float = 0.0

    def __enter__(self) -> None:
        self._before, self._began = _counted(), time.perf_counter()
        self.begin = self.begin or self._began

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end = time.perf_counter()
        self.seconds += self.end - self._began
        for name, count in _counted().items():
            self.counts[name] += count - self._before[name]


def resident_mib(kind: str) -> float:
    """Memory of this process, in MiB: ``VmRSS`` now, or ``VmHWM`` for the most it ever had since it was started.

    ``getrusage`` would tell the memory of the process that started this one, where that had more.
    """
    return int(_table("/proc/self/status")[kind].split()[0]) / 1024


def _counted() -> dict[str, int]:
    found = _table("/proc/self/io")
    return {name: int(found[name]) for name in _COUNTED}


def _table(path: str) -> dict[str, str]:
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}
