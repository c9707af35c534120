"""Spelling: the numbers and words inside the text of a target, read with an error that names the mend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypedDict

from sharded_phema.errors import TargetError

__all__ = [
    "PARAMETERS",
    "UNDERSTOOD",
    "Options",
    "bad",
    "read_amount",
    "read_every",
    "read_options",
    "read_time",
    "spelled",
    "suggestion",
]

UNDERSTOOD = (
    "0.12 (a relative width), power:gamma=6.94, exponential:decay=0.9999 (or halflife=7000, tau=10000; then perhaps "
    ",ramp=0.05 or ,corrected), uniform, window:0.2, decay:linear:0.2, checkpoint; each may end in @t=TIME"
)

PARAMETERS = {
    "power": ("gamma=",),
    "exponential": ("tau=", "halflife=", "decay="),
    "uniform": ("start=",),
    "window": ("",),
    "decay": ("",),
    "checkpoint": (),
}
"""What may stand before the number of each kind that is written as a word; the canonical text has the first."""

_OPTIONS = "after an exponential's number may follow ,ramp=0.05 or ,corrected or ,corrected,start=5000"


class Options(TypedDict, total=False):
    """What may follow the number of an exponential."""

    ramp: float
    corrected: bool
    start: float


def spelled(number: float) -> str:
    """Shortest text that reads back as the same number."""
    return repr(float(number)).removesuffix(".0").replace("e+", "e")


def read_amount(text: object, kind: str, rest: str) -> float:
    """The kind's number; that of an exponential, however it is given, as its time constant."""
    found = "" if kind == "width" else _parameter(text, kind, rest)
    number = _finite(rest.removeprefix(found))
    if number is None and kind == "width":
        raise bad(text, f"{rest!r} is neither a width nor a kind", suggestion(rest))
    if number is None:
        raise bad(text, f"{kind} needs a number, found {rest.removeprefix(found)!r}", f"understood are {UNDERSTOOD}")
    return _time_constant(text, found, number)


def read_options(text: object, words: Sequence[str]) -> Options:
    """What the words after the number of an exponential say."""
    options: Options = {}
    for word in words:
        name, equals, value = word.partition("=")
        number = _finite(value)
        if name in options:
            raise bad(text, f"{name} is given twice", _OPTIONS)
        if name == "corrected" and not equals:
            options["corrected"] = True
        elif name == "ramp" and number is not None:
            options["ramp"] = number
        elif name == "start" and number is not None:
            options["start"] = number
        else:
            raise bad(text, f"{word!r} is no option", _OPTIONS)
    if "corrected" in options and "ramp" in options:
        raise bad(text, "a ramped average has nothing to correct", "leave out ,corrected or ,ramp=...")
    if "start" in options and "corrected" not in options:
        mend = "add ,corrected; without it, an exponential begins with the first weights that the run averages"
        raise bad(text, "start needs corrected", mend)
    return options


def read_every(text: object, rest: str) -> tuple[str, float]:
    """What stands after a power before ``,every=``, and the number after it; 0 without."""
    amount, comma, value = rest.partition(",every=")
    number = _finite(value)
    if comma and (number is None or number < 1.0):
        mend = "every=10 is an average that took no notice of being updated every 10 units of time only"
        raise bad(text, f"every needs a number of at least 1, found {value!r}", mend)
    return amount, number or 0.0


def read_time(text: object, found: str) -> float:
    """The time after the @."""
    number = _finite(found.removeprefix("t=")) if found.startswith("t=") else None
    if number is None or number <= 0.0:
        raise bad(text, f"the time must be @t=NUMBER above 0, found '@{found}'", "write for instance 0.12@t=50000")
    return number


def suggestion(word: str, words: Iterable[str] = PARAMETERS, pattern: str = "{}") -> str:
    """Hint that lists what is understood, after the nearest word if there is one."""
    close = get_close_matches(word, tuple(words), n=1)
    meant = f"did you mean {pattern.format(close[0])}? " if close else ""
    return f"{meant}understood are {UNDERSTOOD}"


def bad(text: object, message: str, hint: str) -> TargetError:
    """The error of a text."""
    return TargetError(f"target {text!r}: {message}", hint=hint)


def _parameter(text: object, kind: str, rest: str) -> str:
    for parameter in PARAMETERS[kind]:
        if rest.startswith(parameter):
            return parameter
    needed = " or ".join(f"{parameter}NUMBER" for parameter in PARAMETERS[kind])
    raise bad(text, f"{kind} needs {needed}, found {rest!r}", f"understood are {UNDERSTOOD}")


def _time_constant(text: object, parameter: str, number: float) -> float:
    if parameter == "halflife=":
        return number / math.log(2.0)
    if parameter == "decay=":
        if not 0.0 < number < 1.0:
            mend = "decay=0.9999 keeps 99.99 % over one unit of training time; for long units give halflife=TIME"
            raise bad(text, f"the decay must be above 0 and below 1, found {number!r}", mend)
        return -1.0 / math.log(number)
    return number


def _finite(found: str) -> float | None:
    try:
        number = float(found)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
