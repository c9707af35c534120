"""Scores: what a metric said of rebuilt averages, one JSON object a line of a file that only grows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from sharded_phema.errors import OutputError, StoreError, TargetError
from sharded_phema.target import parse_target

__all__ = ["VERSION", "Score", "Second", "append_score", "read_scores"]

VERSION = 1
"""Version of the lines; a reader refuses any other."""

_DAMAGED = "repair or remove that line; only a last line that was cut short is left out by itself"
_VERSIONS = "read it with the version of this package that wrote it"
_VALUES = "give what Score asks for; a metric must return a finite number"


@dataclass(frozen=True, slots=True)
class Second:
    """A second parameter that was varied beside the average, such as guidance strength.

    Raises:
        StoreError: The name is empty, or the value is no finite number.
    """

    name: str
    value: float

    def __post_init__(self) -> None:
        _check_text("second.name", self.name)
        _check_number(self, "value", "second.value")


@dataclass(frozen=True, slots=True)
class Score:
    """One evaluation of one rebuilt average.

    Args:
        run: Identity of the run.
        unit: What its training time counts, such as steps.
        metric: What was measured, as a text such as ``pkg.module:function``.
        target: The average in its canonical spelling, without a time.
        t: Training time at which it is read, > 0.
        score: What the metric said.
        forecast: Predicted |rebuilt - target| / |raw - target|, at least 0.
        seconds: How long the evaluation took, at least 0.
        sigma_rel: Relative width of the target, > 0; None where it has none.
        group: Pattern of the parameter names that have this target; None for all.
        base: Target of all other parameters; None where there are none.
        second: A second parameter; None without one.
        repeat: Number of this evaluation among those that are alike, from 0.

    Raises:
        StoreError: A value is not of its kind or range. Numbers must be finite.
    """

    run: str
    unit: str
    metric: str
    target: str
    t: float
    score: float
    forecast: float
    seconds: float
    sigma_rel: float | None = None
    group: str | None = None
    base: str | None = None
    second: Second | None = None
    repeat: int = 0

    def __post_init__(self) -> None:
        for name in ("run", "unit", "metric", "target"):
            _check_text(name, getattr(self, name))
        for name in ("group", "base"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("t", "score", "forecast", "seconds"):
            _check_number(self, name)
        if self.sigma_rel is not None:
            _check_number(self, "sigma_rel")
        if not isinstance(self.second, Second | None):
            raise _bad(f"second must be a name and a value, or null, found {self.second!r}")
        if isinstance(self.repeat, bool) or not isinstance(self.repeat, int) or self.repeat < 0:
            raise _bad(f"repeat must be a whole number from 0, found {self.repeat!r}")
        _check_target(self.target)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this evaluation from others: all but what came out of it."""
        return (
            *(self.run, self.metric, self.target, self.t),
            *(self.group, self.base, self.second, self.repeat),
        )


def read_scores(path: str | Path) -> tuple[Score, ...]:
    """All scores of a file, in the order in which they were appended.

    A last line that was cut short is left out.

    Raises:
        StoreError: The file cannot be read, or another line is damaged or of another version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}", hint="give the file that a sweep writes") from error
    lines = data.split(b"\n")
    last = [] if _is_cut_short(lines[-1]) else lines[-1:]
    found: list[Score] = []
    for number, line in enumerate([*lines[:-1], *last], 1):
        if line.strip():
            try:
                found.append(_read(line))
            except StoreError as error:
                hint = error.hint if error.hint == _VERSIONS else _DAMAGED
                raise StoreError(f"{path}, line {number}: {error.message}", hint=hint) from None
    return tuple(found)


def append_score(path: str | Path, score: Score) -> None:
    """Add one line to a file, and return once it is on the disk.

    What a killed process left of a last line is cut off first. Only one process at a time may append.

    Args:
        path: The file; it is made where there is none, its folder is not.
        score: What to add.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            line = _finish_last_line(descriptor) + _line(score)
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}", hint="check the folder and the space left") from error


def _finish_last_line(descriptor: int) -> bytes:
    """Cut a half-written last line off; what the next line must begin with where the last one only lacks its end."""
    size = os.fstat(descriptor).st_size
    tail = b""
    while size > len(tail) and b"\n" not in tail:
        begin = max(0, size - len(tail) - 4096)
        tail = os.pread(descriptor, size - len(tail) - begin, begin) + tail
    rest = tail.rpartition(b"\n")[2]
    if not rest.strip() or not _is_cut_short(rest):
        return b"\n" if rest else b""
    os.ftruncate(descriptor, size - len(rest))
    return b""


def _is_cut_short(line: bytes) -> bool:
    """Whether a line without its end is no whole object: the beginning of one never is."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _line(score: Score) -> bytes:
    second = score.second and {"name": score.second.name, "value": float(score.second.value)}
    values = {field.name: getattr(score, field.name) for field in fields(Score)}
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, Real) and name != "repeat"}
    return json.dumps({"version": VERSION} | values | numbers | {"second": second}, allow_nan=False).encode() + b"\n"


def _read(line: bytes) -> Score:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _bad(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _bad(f"expected an object, found {type(found).__name__}")
    version = found.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        raise StoreError(f"expected version {VERSION}, found {version!r}", hint=_VERSIONS)
    _check_names(found, Score)
    if isinstance(found["second"], dict):
        _check_names(found["second"], Second)
        found["second"] = Second(**found["second"])
    return Score(**found)


def _check_names(found: Mapping[str, Any], kind: type[Score] | type[Second]) -> None:
    expected = {field.name for field in fields(kind)}
    for what, names in (("lacks", expected - found.keys()), ("has the unknown", found.keys() - expected)):
        if names:
            raise _bad(f"it {what} {', '.join(sorted(names))}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise _bad(f"{name} must be a text, found {value!r}")


def _check_number(holder: Score | Second, name: str, called: str = "") -> None:
    least = {"t": 0.0, "sigma_rel": 0.0, "forecast": 0.0, "seconds": 0.0}.get(name, -math.inf)
    above = name in ("t", "sigma_rel")
    value = getattr(holder, name)
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):
        limit = "" if least < 0.0 else " above 0" if above else " of at least 0"
        raise _bad(f"{called or name} must be a finite number{limit}, found {value!r}")


def _check_target(text: str) -> None:
    try:
        target = parse_target(text)
    except TargetError as error:
        raise _bad(error.message) from None
    if target.time is not None or target.text != text:
        raise _bad(f"target {text!r} is not the canonical spelling without a time")


def _bad(message: str) -> StoreError:
    return StoreError(message, hint=_VALUES)
