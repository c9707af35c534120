"""Target: an average that a user asks for, as text.

    0.12                    power profile of relative width 0.12
    power:gamma=6.94        power profile of that exponent; gamma=0 is the running mean
    exponential:tau=2000    constant decay with that time constant, in training time
    window:0.2              plain mean of the last 20 % of the run
    decay:linear:0.2        what a linear (cosine, sqrt) learning-rate decay over the last 20 % would give

Each may end in ``@t=TIME``: read at that training time instead of the end of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import cast, get_args

from sharded_phema.errors import TargetError
from sharded_phema.profile import Decay, Exponential, Power, Profile, Shape, Uniform
from sharded_phema.width import gamma_of

__all__ = ["Target", "parse_target", "parse_targets"]

_UNDERSTOOD = (
    "0.12 (a relative width), power:gamma=6.94, exponential:tau=2000, window:0.2, decay:linear:0.2; "
    "each may end in @t=TIME"
)
# What stands between the kind and its number, for the kinds that are written as words.
_PARAMETER = {"power": "gamma=", "exponential": "tau=", "window": "", "decay": ""}


@dataclass(frozen=True, slots=True)
class Target:
    """Average that a user asks for; made by ``parse_target``.

    Args:
        kind: ``width``, ``power``, ``exponential``, ``window`` or ``decay``.
        amount: The kind's number: relative width, gamma, tau or fraction of the run.
        shape: Shape of the decay, empty for the other kinds.
        time: Training time at which it is read, None for the end of the run.
    """

    kind: str
    amount: float
    shape: str
    time: float | None

    @property
    def text(self) -> str:
        """Canonical spelling, which parses to the same target."""
        amount, time = _spelled(self.amount), "" if self.time is None else f"@t={_spelled(self.time)}"
        if self.kind == "width":
            return amount + time
        return ":".join(filter(None, (self.kind, self.shape, _PARAMETER[self.kind] + amount))) + time

    @property
    def slug(self) -> str:
        """The text with nothing that a file name cannot hold; differs where the text differs."""
        return self.text.replace("@", "-").replace(":", "-").replace("=", "-")

    def profile(self, t: float, start: float = 0.0) -> Profile:
        """Profile of the average.

        Args:
            t: Training time at which the average is read where the text has no ``@t=``; the text's own time wins.
            start: Training time at which the averaging of the run began; windows and decays begin no earlier.

        Raises:
            TargetError: The start is not before the time at which the average is read.
        """
        t = t if self.time is None else self.time
        if self.kind == "exponential":
            return Exponential(self.amount, t, start)
        if self.kind in ("window", "decay"):
            begin = max(start, t * (1.0 - self.amount))
            return Uniform(begin, t) if self.kind == "window" else Decay(cast(Shape, self.shape), begin, t)
        return Power(self.amount if self.kind == "power" else gamma_of(self.amount), t, start)


def parse_target(text: str | float) -> Target:
    """Target that the text, or a bare relative width, asks for.

    Raises:
        TargetError: The text is none of what is understood, or a number in it is outside its range.
    """
    head, at, time = str(text).strip().partition("@")
    kind, colon, rest = head.partition(":")
    if isinstance(text, bool) or not isinstance(text, str | Real):
        raise _bad(text, "neither a text nor a number", f"understood are {_UNDERSTOOD}")
    if not colon and kind not in _PARAMETER:
        kind, rest = "width", head
    if kind != "width" and kind not in _PARAMETER:
        raise _bad(text, f"unknown kind {kind!r}", _suggestion(kind))
    shape, rest = _split_shape(text, rest) if kind == "decay" else ("", rest)
    target = Target(kind, _amount(text, kind, rest), shape, _time(text, time) if at else None)
    _check_amount(text, target)
    return target


def parse_targets(texts: Iterable[str | float]) -> tuple[Target, ...]:
    """Targets in the order given.

    Raises:
        TargetError: A bad text, no text at all, or two texts that ask for the same.
    """
    if not isinstance(texts, Iterable) or isinstance(texts, str):
        raise _bad(texts, "one text where a list is expected", "wrap it in a list, or call parse_target")
    targets = tuple(parse_target(text) for text in texts)
    if not targets:
        raise TargetError("no target: at least one is expected", hint=f"understood are {_UNDERSTOOD}")
    seen: set[str] = set()
    for target in targets:
        if target.text in seen:
            raise TargetError(f"target {target.text!r} is asked for twice", hint="name every target once")
        seen.add(target.text)
    return targets


def _split_shape(text: object, rest: str) -> tuple[str, str]:
    shape, _, fraction = rest.partition(":")
    if shape not in get_args(Shape):
        raise _bad(text, f"unknown shape {shape!r}", _suggestion(shape, get_args(Shape), "decay:{}:0.2"))
    return shape, fraction


def _amount(text: object, kind: str, rest: str) -> float:
    parameter = _PARAMETER.get(kind, "")
    if not rest.startswith(parameter):
        raise _bad(text, f"{kind} needs {parameter}NUMBER, found {rest!r}", f"understood are {_UNDERSTOOD}")
    found = rest.removeprefix(parameter)
    number = _finite(found)
    if number is None and kind == "width":
        raise _bad(text, f"{found!r} is neither a width nor a kind", _suggestion(found))
    if number is None:
        raise _bad(text, f"{kind} needs a number, found {found!r}", f"understood are {_UNDERSTOOD}")
    return number


def _time(text: object, found: str) -> float:
    number = _finite(found.removeprefix("t=")) if found.startswith("t=") else None
    if number is None or number <= 0.0:
        raise _bad(text, f"the time must be @t=NUMBER above 0, found '@{found}'", "write for instance 0.12@t=50000")
    return number


def _check_amount(text: object, target: Target) -> None:
    try:
        if target.kind in ("window", "decay"):
            if not 0.0 < target.amount <= 1.0:
                raise TargetError(
                    f"the fraction must be above 0 and at most 1, found {target.amount!r}",
                    hint="0.2 is the last 20 % of the run",
                )
        else:
            target.profile(1.0 if target.time is None else target.time)
    except TargetError as error:
        raise _bad(text, error.message, f"{error.hint}; understood are {_UNDERSTOOD}") from None


def _finite(found: str) -> float | None:
    try:
        number = float(found)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _spelled(number: float) -> str:
    return repr(float(number)).removesuffix(".0").replace("e+", "e")


def _suggestion(word: str, words: Iterable[str] = _PARAMETER, pattern: str = "{}") -> str:
    close = get_close_matches(word, tuple(words), n=1)
    meant = f"did you mean {pattern.format(close[0])}? " if close else ""
    return f"{meant}understood are {_UNDERSTOOD}"


def _bad(text: object, message: str, hint: str) -> TargetError:
    return TargetError(f"target {text!r}: {message}", hint=hint)
