"""Ranges: which widths, training times and values of a second parameter a sweep goes through, from their texts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from sharded_phema.errors import TargetError
from sharded_phema.recommend import spread_widths
from sharded_phema.scores import Second
from sharded_phema.source import sources_of
from sharded_phema.store import Run
from sharded_phema.target import Target, parse_target

__all__ = ["RESERVED", "Times", "expand_seconds", "expand_targets", "expand_times"]

Times = str | Sequence[float]
"""Training times, or their text: ``50000,100000``, ``all``, or ``count=8``."""

RESERVED = ("target", "t", "repeat")
"""Arguments of a metric that say what it measures."""

MOST = 10_000
"""Targets that a range may have: more are a slip of the pen."""

_NUMBER = r"(\d*\.?\d+(?:[eE][-+]?\d+)?)"
_RANGE = re.compile(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}")
_EXAMPLE = "0.02:0.28:0.01 are the widths from 0.02 to 0.28 in steps of 0.01"


def expand_targets(wanted: str | Iterable[str | float]) -> tuple[Target, ...]:
    """Targets of a text, such as ``0.05,0.10,window:0.2`` or ``0.02:0.28:0.01``, or of several; each once.

    ``LOW:HIGH`` without a step are nine widths, evenly spaced in their logarithm.

    Raises:
        TargetError: A text is none of what is understood, or there is none.
    """
    texts = [wanted] if isinstance(wanted, str) else list(wanted)
    parts = [part for text in texts for part in (_split(text) if isinstance(text, str) else [text])]
    found = dict.fromkeys(parse_target(one) for part in parts for one in _spread(part))
    if not found:
        raise TargetError("no target: at least one is expected", hint=_EXAMPLE)
    return tuple(found)


def expand_times(run: Run, times: Times) -> tuple[float, ...]:
    """Training times of a text or list, in order, each once; the last snapshot's where nothing is said.

    ``all`` are those of all snapshots, and ``count=8`` eight of them, evenly spread, with the last one.

    Raises:
        TargetError: The text is none of what is understood, or a time lies outside the snapshots.
        StoreError: The run has no snapshots.
    """
    known = list(dict.fromkeys(source.snapshot.t for source in sources_of(run)))
    if isinstance(times, str) and times == "all":
        return tuple(known)
    if isinstance(times, str) and times.startswith("count="):
        count = min(_count(times), len(known))
        return tuple(known[len(known) * (i + 1) // count - 1] for i in range(count))
    found = sorted(dict.fromkeys(_times(times))) or known[-1:]
    for t in found:
        if not known[0] <= t <= known[-1]:
            raise TargetError(
                f"times: training time {t:g} lies outside the snapshots of {run.root.url}, which span "
                f"{run.record.unit} {known[0]:g} to {known[-1]:g}",
                hint=f"choose times from {known[0]:g} to {known[-1]:g}",
            )
    return tuple(found)


def expand_seconds(second: str | Mapping[str, Sequence[float]] | None) -> tuple[Second | None, ...]:
    """Values of a second parameter, from ``guidance=1.0,1.5,2.0`` or ``{"guidance": [1.0, 1.5, 2.0]}``.

    Returns:
        Each value once, in the order given; nothing but None where there is no such parameter.

    Raises:
        TargetError: Neither a name that Python takes for an argument with numbers, nor None.
    """
    if not second:
        return (None,)
    if isinstance(second, str):
        name, _, rest = second.partition("=")
        values: Sequence[object] = rest.split(",")
    else:
        ((name, values),) = [*second.items()] if len(second) == 1 else [("", [])]
    numbers = [_number(value) for value in values]
    if not name.isidentifier() or name in RESERVED or not numbers or None in numbers:
        raise TargetError(
            f"second: expected one name, none of {', '.join(RESERVED)}, and its values, found {second!r}",
            hint="for example guidance=1.0,1.5,2.0",
        )
    return tuple(Second(name, number) for number in dict.fromkeys(numbers) if number is not None)


def _split(text: str) -> list[str]:
    """Parts of a list, with the commas that belong to an exponential's options left in it."""
    parts: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if parts and part.startswith(("ramp=", "corrected", "start=")):
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts


def _spread(part: str | float) -> Iterable[str | float]:
    found = _RANGE.fullmatch(part) if isinstance(part, str) else None
    if found is None:
        return spread_widths(part) if isinstance(part, str) else [part]
    # In decimals, so that 0.02 + 0.01 is 0.03.
    first, last, step = map(Decimal, found.groups())
    count = int((last - first) / step) + 1 if step > 0 and last >= first else 0
    if not 1 <= count <= MOST:
        raise TargetError(f"range of widths {part}: expected LOW:HIGH:STEP, found {count} of them", hint=_EXAMPLE)
    return [str(first + step * i) for i in range(count)]


def _times(times: Times) -> list[float]:
    parts: Sequence[object] = times.split(",") if isinstance(times, str) else times
    found = [_number(part) for part in parts if part != ""]
    if None in found:
        raise TargetError(
            f"times: expected training times, all or count=N, found {times!r}", hint="for example 50000,100000"
        )
    return [t for t in found if t is not None]


def _count(text: str) -> int:
    count = text.removeprefix("count=")
    if not count.isdecimal() or int(count) < 1:
        raise TargetError(f"times: expected a number of snapshots, found {text!r}", hint="for example count=8")
    return int(count)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
