"""Retention: which snapshots to keep so that the averages that will be asked for stay near enough, or as near as fits.

0.03:0.25 tolerance=1e-2                  as few snapshots as rebuild nine widths from 0.03 to 0.25 that well
0.12 decay:linear:0.2 count=20            the best twenty
0.03:0.25 bytes=10GB                      the best that take no more disk
0.03:0.25 tolerance=1e-2 earlier=2        as well at earlier ends, one for each doubling of training time
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_phema.errors import TargetError, check_number
from sharded_phema.recommend import spread_widths
from sharded_phema.spelling import spelled
from sharded_phema.target import Target, parse_target, parse_targets

__all__ = ["Retention", "parse_retention"]


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep snapshots for, and how well or how many: exactly one of ``tolerance``, ``count`` and ``bytes``.

    Args:
        targets: What will be wanted at the end of the run: texts as ``parse_target`` reads them, and ranges of widths
            such as ``"0.03:0.25"``. One with ``@t=TIME`` is wanted at that time.
        tolerance: Largest forecast error of each target, relative to |raw - target|, > 0.
        count: Number of snapshots to keep, > 0.
        bytes: Bytes of snapshots to keep, > 0.
        earlier: Targets are also wanted at the first snapshots at or after each power of this number, > 1; infinite
            if at the end alone.

    Raises:
        TargetError: Not exactly one limit, a number out of its range, or a text that is no target.
    """

    targets: tuple[str | float, ...]
    tolerance: float | None = None
    count: int | None = None
    bytes: int | None = None
    earlier: float = math.inf

    def __post_init__(self) -> None:
        given = [name for name in _LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise TargetError(
                f"retention: expected one of {', '.join(_LIMITS)}, found {' and '.join(given) or 'none'}", hint=_EXAMPLE
            )
        check_number(getattr(self, given[0]), f"retention: {given[0]}", "above 0", lambda x: x > 0, _EXAMPLE)
        if self.count is not None and self.count != int(self.count):
            raise TargetError(f"retention: count must be a whole number, found {self.count}", hint=_EXAMPLE)
        if self.earlier != math.inf:
            if self.tolerance is None:
                raise TargetError(
                    "retention: earlier goes with a tolerance alone", hint="give a tolerance, or leave it out"
                )
            mend = "earlier=2 keeps targets at each doubling of training time"
            check_number(self.earlier, "retention: earlier", "above 1", lambda x: x > 1, mend)
        if isinstance(self.targets, str):
            raise TargetError(f"retention: targets must be a list, found {self.targets!r}", hint="use parse_retention")
        _ = self.wanted

    @property
    def wanted(self) -> tuple[Target, ...]:
        """Every target, ranges spread into nine widths."""
        return parse_targets(text for target in self.targets for text in spread_widths(str(target)))

    @property
    def text(self) -> str:
        """Spelling that ``parse_retention`` reads as the same."""
        words = [text if ":" in (text := str(target)) else parse_target(text).text for target in self.targets]
        words += [f"{name}={spelled(value)}" for name in _LIMITS if (value := getattr(self, name)) is not None]
        return " ".join(words + [f"earlier={spelled(self.earlier)}"] * (self.earlier < math.inf))


_LIMITS = ("tolerance", "count", "bytes")
_EXAMPLE = 'write for instance "0.03:0.25 tolerance=1e-2", "0.03:0.25 count=20" or "0.03:0.25 bytes=10GB"'


def parse_retention(text: str) -> Retention:
    """Retention that the text asks for: targets and one limit, with blanks between.

    Raises:
        TargetError: The text is none of what is understood.
    """
    targets: list[str | float] = []
    options: dict[str, float] = {}
    for word in str(text).split():
        name, equals, value = word.partition("=")
        if not equals or name not in (*_LIMITS, "earlier"):
            targets.append(word)
            continue
        if name in options:
            raise TargetError(f"retention {text!r}: {name} is given twice", hint=_EXAMPLE)
        options[name] = _number(text, name, value)
    return Retention(tuple(targets), **options)  # type: ignore[arg-type]


def _number(text: str, name: str, value: str) -> float:
    from sharded_phema.export import byte_count  # loads torch

    try:
        if name == "bytes":
            return byte_count(value)
        return int(value) if name == "count" else float(value)
    except ValueError:
        raise TargetError(f"retention {text!r}: {name} must be a number, found {value!r}", hint=_EXAMPLE) from None
