"""Target: an average that a user asks for, as text.

    0.12                           power profile of relative width 0.12
    power:gamma=6.94               power profile of that exponent
    exponential:decay=0.9999       constant decay per one unit of training time (one step, sample or token)
    exponential:halflife=7000      the same by half-life, in training time; also tau=TIME, 1.44 half-lives
    uniform                        running mean since time 0; uniform:start=TIME, since then (SWA)
    window:0.2                     plain mean of the last 20 % of the run
    decay:linear:0.2               what a linear (cosine, sqrt) learning-rate decay over the last 20 % would give
    checkpoint                     the weights themselves, not averaged

After an exponential's number may follow ``,ramp=0.05`` (half-life at most 5 % of the training so far) or
``,corrected`` (Adam's bias correction, counted from time 0 or from ``,start=TIME``). Every text may end in
``@t=TIME``: read at that training time instead of the end of the run. ``power:gamma=6.94,every=10`` names what some
packages really keep when they update a power profile every 10 steps (``profile.Unaware``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import cast, get_args

from sharded_phema.errors import TargetError, check_number
from sharded_phema.profile import (
    Checkpoint,
    Decay,
    Exponential,
    Power,
    Profile,
    Ramped,
    Shape,
    Tracked,
    Unaware,
    Uniform,
)
from sharded_phema.spelling import (
    PARAMETERS,
    UNDERSTOOD,
    bad,
    read_amount,
    read_every,
    read_options,
    read_time,
    spelled,
    suggestion,
)
from sharded_phema.width import gamma_of

__all__ = ["Target", "parse_target", "parse_targets"]

# Kinds that need no number.
_BARE = ("uniform", "checkpoint")


@dataclass(frozen=True, slots=True)
class Target:
    """Average that a user asks for; made by ``parse_target``.

    Args:
        kind: ``width``, ``power``, ``exponential``, ``uniform``, ``window``, ``decay`` or ``checkpoint``.
        amount: The kind's number: relative width, gamma, tau or fraction of the run; 0 for uniform and checkpoint.
        shape: Shape of the decay, empty for the other kinds.
        time: Training time at which it is read, None for the end of the run.
        ramp: Largest half-life of an exponential as a fraction of the training so far; infinite without a ramp.
        corrected: Whether an exponential is corrected for bias.
        start: Training time from which a uniform or corrected average counts.
        every: Units of time between the updates of a power profile that takes no notice of them; 0 for one that does.
    """

    kind: str
    amount: float
    shape: str
    time: float | None
    ramp: float = math.inf
    corrected: bool = False
    start: float = 0.0
    every: float = 0.0

    @property
    def text(self) -> str:
        """Canonical spelling, which parses to the same target."""
        time = "" if self.time is None else f"@t={spelled(self.time)}"
        if self.kind == "width":
            return spelled(self.amount) + time
        options = [] if self.kind in _BARE else [PARAMETERS[self.kind][0] + spelled(self.amount)]
        options += [f"every={spelled(self.every)}"] * (self.every > 0.0)
        options += [f"ramp={spelled(self.ramp)}"] * (self.ramp < math.inf) + ["corrected"] * self.corrected
        options += [f"start={spelled(self.start)}"] * (self.start > 0.0)
        return ":".join(filter(None, (self.kind, self.shape, ",".join(options)))) + time

    @property
    def slug(self) -> str:
        """The text with nothing that a file name cannot hold; differs where the text differs."""
        return self.text.translate(str.maketrans("@:=,", "----"))

    @property
    def has_start(self) -> bool:
        """Whether it counts from ``start``, rather than letting the first weights stand for all before them."""
        return self.kind == "uniform" or self.corrected

    def profile(self, t: float, start: float = 0.0) -> Profile:
        """Profile of the average.

        Args:
            t: Training time at which the average is read where the text has no ``@t=``; the text's own time wins.
            start: Training time of the first weights that the run averaged; windows and decays begin no earlier.

        Raises:
            TargetError: The start is not before the time at which the average is read.
        """
        t = t if self.time is None else self.time
        if self.kind in ("window", "decay"):
            begin = max(start, t * (1.0 - self.amount))
            return Uniform(begin, t) if self.kind == "window" else Decay(cast(Shape, self.shape), begin, t)
        if self.kind == "checkpoint":
            return Checkpoint(t)
        if self.every > 0.0:
            return Unaware(self.amount, self.every, t, start)
        return self._running(t, start)

    def tracked(self, t: float, start: float) -> Tracked:
        """Profile at ``t`` of a running average of this kind that took its first weights at ``start``.

        Raises:
            TargetError: No running average is of this kind, or the start is after ``t``.
        """
        if self.kind in ("window", "decay", "checkpoint") or self.time is not None or self.every > 0.0:
            what = "an average read at one time" if self.time is not None else f"a {self.kind}"
            what = what if self.every == 0.0 else "an average that takes no notice of the time between its updates"
            mend = "rebuild it after training; what can be tracked is a width, power, exponential or uniform"
            raise bad(self.text, f"{what} cannot be tracked", mend)
        return self._running(t, start)

    def _running(self, t: float, start: float) -> Tracked:
        if self.has_start and self.start > 0.0:
            return self._since(t, max(self.start, start))
        if self.kind == "uniform":
            return Power(0.0, t, start)
        if self.kind != "exponential":
            return Power(self.amount if self.kind == "power" else gamma_of(self.amount), t, start)
        if self.ramp < math.inf:
            return Ramped(self.amount, self.ramp, t, start)
        return Exponential(self.amount, t, 0.0 if self.corrected else start, corrected=self.corrected)

    def _since(self, t: float, start: float) -> Tracked:
        """Profile of an average that counts from ``start``; until then it is the weights at ``t``."""
        if self.kind == "uniform":
            return Uniform(start, t) if start < t else Power(0.0, t, t)
        return Exponential(self.amount, t, min(start, t), corrected=bool(start < t))


def parse_target(text: str | float) -> Target:
    """Target that the text, or a bare relative width, asks for.

    Raises:
        TargetError: The text is none of what is understood, or a number in it is outside its range.
    """
    head, at, time = str(text).strip().partition("@")
    kind, colon, rest = head.partition(":")
    if isinstance(text, bool) or not isinstance(text, str | Real):
        raise bad(text, "neither a text nor a number", f"understood are {UNDERSTOOD}")
    if not colon and kind not in PARAMETERS:
        kind, rest = "width", head
    if kind != "width" and kind not in PARAMETERS:
        raise bad(text, f"unknown kind {kind!r}", suggestion(kind))
    shape, rest = _split_shape(text, rest) if kind == "decay" else ("", rest)
    if kind == "checkpoint" and colon:
        raise bad(text, f"a checkpoint has no number, found {rest!r}", "write checkpoint or checkpoint@t=5000")
    rest, every = read_every(text, rest) if kind == "power" else (rest, 0.0)
    amount, *words = rest.split(",") if kind == "exponential" else [rest]
    target = Target(
        kind,
        0.0 if kind in _BARE else read_amount(text, kind, amount),
        shape,
        read_time(text, time) if at else None,
        every=every,
        **read_options(text, words),
    )
    if kind == "uniform" and colon:
        target = replace(target, start=read_amount(text, kind, rest))
    _check_amounts(text, target)
    return target


def parse_targets(texts: Iterable[str | float]) -> tuple[Target, ...]:
    """Targets in the order given.

    Raises:
        TargetError: A bad text, no text at all, or two texts that ask for the same.
    """
    if not isinstance(texts, Iterable) or isinstance(texts, str):
        raise bad(texts, "one text where a list is expected", "wrap it in a list, or call parse_target")
    targets = tuple(parse_target(text) for text in texts)
    if not targets:
        raise TargetError("no target: at least one is expected", hint=f"understood are {UNDERSTOOD}")
    seen: set[str] = set()
    for target in targets:
        if target.text in seen:
            raise TargetError(f"target {target.text!r} is asked for twice", hint="name every target once")
        seen.add(target.text)
    return targets


def _split_shape(text: object, rest: str) -> tuple[str, str]:
    shape, _, fraction = rest.partition(":")
    if shape not in get_args(Shape):
        raise bad(text, f"unknown shape {shape!r}", suggestion(shape, get_args(Shape), "decay:{}:0.2"))
    return shape, fraction


def _check_amounts(text: object, target: Target) -> None:
    try:
        if target.kind in ("window", "decay") and not 0.0 < target.amount <= 1.0:
            raise TargetError(
                f"the fraction must be above 0 and at most 1, found {target.amount!r}",
                hint="0.2 is the last 20 % of the run",
            )
        check_number(target.start, "start", "at least 0", lambda x: x >= 0, "start is a training time")
        target.profile(1.0 if target.time is None else target.time)
    except TargetError as error:
        raise bad(text, error.message, f"{error.hint}; understood are {UNDERSTOOD}") from None
