"""Metric: the user's own measure of rebuilt weights, a function or a command."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_phema.errors import OrderError, PhemaError
from sharded_phema.sweeping.points import Point
from sharded_phema.sweeping.ranges import RESERVED

__all__ = ["Command", "Measure", "Metric", "measure_of"]

Metric = Callable[..., Any] | str
"""What a user gives: a function, its text, or a ``Command``."""

_PLACEHOLDER = re.compile(r"\{(dir|target|t|value|repeat|rank)\}")
# What tells a program that it is one of torchrun's processes, which a command is not.
_LAUNCHER = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*)"
)
_LINES = 5
EVERYTHING = "**"


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that scores one folder, without a shell between.

    ``{dir}`` stands for the folder, ``{target}`` and ``{t}`` for the average, ``{value}`` for the second parameter,
    ``{repeat}`` for the number of the repeat, from 0, and ``{rank}`` for that of this process on its machine. The last
    line that it prints is the score: a number, or JSON such as ``{"score": 1.5}``.

    Raises:
        OrderError: It cannot be taken apart, or has no ``{dir}``.
    """

    text: str

    def __post_init__(self) -> None:
        if "{dir}" not in self.text or not self.words:
            raise OrderError(
                f"command {self.text!r}: expected {{dir}}, where the folder of the rebuilt model is put",
                hint='for example --command "python eval.py {dir}"',
            )

    @property
    def words(self) -> list[str]:
        """Program and arguments, placeholders as they are."""
        try:
            return shlex.split(self.text)
        except ValueError as error:
            raise OrderError(f"command {self.text!r}: {error}", hint="check its quotes") from None

    def __call__(self, folder: Path, point: Point, repeat: int) -> object:
        """Score of a folder.

        Raises:
            PhemaError: The command failed, or printed no score.
        """
        words = [_PLACEHOLDER.sub(lambda found: _value(found[1], folder, point, repeat), word) for word in self.words]
        environment = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        except OSError as error:
            raise PhemaError(f"command {words[0]!r} cannot be started: {error}", hint="check its name") from error
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_LINES:])
            raise PhemaError(
                f"command {shlex.join(words)!r} ended with exit code {done.returncode}: {said or 'it said nothing'}",
                hint="run it by hand; the same sweep then goes on where it stopped",
            )
        return _printed(done.stdout, words)


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric that is ready to be called; made by ``measure_of``.

    Attributes:
        name: What it is called in a file of scores.
    """

    name: str
    _call: Callable[[Any, Point, int], object]

    def __call__(self, weights: Any, point: Point, repeat: int) -> object:
        """What the metric says of some weights.

        Raises:
            PhemaError: The command failed.
            Exception: What the user's function raises passes through.
        """
        return self._call(weights, point, repeat)

    def score(self, found: object) -> float:
        """What it said, as a number.

        Raises:
            PhemaError: It is no finite one.
        """
        return _score(found, self.name)


def measure_of(metric: Metric, *, second: str) -> Measure:
    """The user's metric, found and ready.

    A function is called with the weights, with the second parameter by its name, and with those of ``target``, ``t``
    and ``repeat`` that it has arguments for.

    Args:
        metric: A function, ``"package.module:function"``, ``"path/to/file.py:function"`` or a ``Command``.
        second: Name of a second parameter; empty without one.

    Raises:
        OrderError: There is no such function, the command asks for what there is not, or the function does not take
            the second parameter.
    """
    if isinstance(metric, Command):
        if not second and "{value}" in metric.text:
            raise OrderError(
                f"command {metric.text!r}: {{value}} without a second parameter", hint="give --second NAME=VALUES"
            )
        return Measure(metric.text, metric)
    function = _found(metric) if isinstance(metric, str) else metric
    if not callable(function):
        raise OrderError(f"metric: expected a function, found {function!r}", hint="for example my_module:fid")
    taken = _parameters(function)
    if second and taken is not None and not taken & {second, EVERYTHING}:
        raise OrderError(
            f"metric {_name(function)} has no argument {second!r}",
            hint="give it one, or leave the second parameter out",
        )
    known = (taken or set()) & {*RESERVED}

    def call(weights: Any, point: Point, repeat: int) -> object:
        told = {"target": point.target.text, "t": point.line.t, "repeat": repeat}
        extra: dict[str, Any] = {name: told[name] for name in known}
        if point.line.second:
            extra[point.line.second.name] = point.line.second.value
        # A dictionary of its own: what one call takes out is there for the next.
        return function(dict(weights) if isinstance(weights, dict) else weights, **extra)

    return Measure(metric if isinstance(metric, str) else _name(function), call)


def _found(text: str) -> Any:
    """What ``package.module:function`` or ``path/to/file.py:function`` names; where it lies, modules are found too."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise OrderError(f"metric: expected MODULE:FUNCTION, found {text!r}", hint="for example my_package.scores:fid")
    path = Path(place)
    folder, module = (path.parent, path.stem) if path.suffix == ".py" else (Path(), place)
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise  # of something that it needs
        raise OrderError(
            f"metric {text!r}: there is no module {error.name}",
            hint="start where it lies, or give path/to/file.py:NAME",
        ) from error
    except AttributeError as error:
        raise OrderError(f"metric {text!r}: {error}", hint="check the name of the function") from error
    return found


def _parameters(function: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments, and of what takes all others; None of what is built in."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return {EVERYTHING if p.kind == inspect.Parameter.VAR_KEYWORD else p.name for p in found}


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # of a partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _value(placeholder: str, folder: Path, point: Point, repeat: int) -> str:
    """What stands for a placeholder."""
    line = point.line
    return {
        "dir": str(folder),
        "target": point.target.text,
        "t": f"{line.t:.17g}",
        "value": f"{line.second.value:.17g}" if line.second else "",
        "repeat": str(repeat),
        "rank": os.environ.get("LOCAL_RANK", "0"),
    }[placeholder]


def _printed(text: str, words: list[str]) -> object:
    """The score in the last line of what a command printed."""
    last = (text.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(last)
        return found["score"] if isinstance(found, dict) else float(last)
    except (ValueError, KeyError):
        pass
    try:
        return float(last)
    except ValueError:
        raise PhemaError(
            f"command {shlex.join(words)!r}: expected a number or JSON with a score as its last line, found {last!r}",
            hint='print the score last, such as 1.5 or {"score": 1.5}',
        ) from None


def _score(found: object, name: str) -> float:
    try:
        if isinstance(found, bool | str):
            raise TypeError
        score = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise PhemaError(
            f"metric {name}: expected a number, found {found!r:.100}", hint="return one number, such as a float"
        ) from None
    if not math.isfinite(score):
        raise PhemaError(
            f"metric {name}: expected a finite number, found {score}",
            hint="return a large one for weights that cannot be scored, so that the sweep goes on",
        )
    return score
