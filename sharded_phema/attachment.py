"""Attachment: training time goes on by itself, after each step of one of torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer

from sharded_phema.errors import OrderError, UnsupportedModel, check_number

__all__ = ["Advance", "Attachment"]

Advance = float | Callable[[], float] | None
"""How far training time goes on at a step: a number, what gives one, or None for 1."""


class Attachment:
    """Between averages and at most one optimizer. Made loose."""

    def __init__(self) -> None:
        self._removers: list[Callable[[], None]] = []

    def begin(self, optimizer: object, advance: Advance, update: Callable[[float], object]) -> Attachment:
        """Have something called after each step that an optimizer makes, not after those that a GradScaler skips.

        Args:
            optimizer: One of torch's, or a wrapper around it that has it as ``optimizer``.
            advance: As of ``PostHocEMA.attach``.
            update: Is given how far training time goes on.

        Returns:
            This, to be removed.

        Raises:
            OrderError: There is an attachment already.
            UnsupportedModel: This is no optimizer of torch.
            TargetError: ``advance`` is neither None nor a number above 0, nor can it be called.
        """
        if self._removers:
            raise OrderError(
                "attach: the averages are attached to an optimizer already, and would be updated twice a step",
                hint="of several optimizers attach to the one that steps last; remove() the earlier attachment first",
            )
        inner, increment = _inner(optimizer), _increment(advance)

        def stepped(stepping: Optimizer, args: Any, kwargs: Any) -> None:
            if not _skipped(stepping):
                update(increment())

        self._removers.append(inner.register_step_post_hook(stepped).remove)
        return self

    def remove(self) -> None:
        """End it. Removing twice is harmless."""
        while self._removers:
            self._removers.pop()()


def _inner(optimizer: object) -> Optimizer:
    """The optimizer whose hooks are called: wrappers that are of torch's class themselves never call theirs."""
    inner = optimizer
    for _ in range(4):  # an object that calls itself its optimizer must not hang us
        if not isinstance(inner, Optimizer) or not hasattr(inner, "optimizer"):
            break
        inner = inner.optimizer
    if isinstance(inner, Optimizer) and not hasattr(inner, "optimizer"):
        return inner
    raise UnsupportedModel(
        f"attach: expected one of torch's optimizers, found {type(inner).__qualname__}, which calls no hook once the "
        "weights are written",
        hint="call ema.update() yourself: after engine.step() of DeepSpeed, or after backward() where each parameter "
        "has an optimizer of its own that steps inside of it",
    )


def _increment(advance: Advance) -> Callable[[], float]:
    if callable(advance):
        return advance
    amount = 1.0 if advance is None else advance
    mend = "give the samples or tokens of one step of all ranks, or a function without arguments that gives them"
    check_number(amount, "advance", "above 0", lambda x: x > 0, mend)
    return lambda: amount


def _skipped(optimizer: Optimizer) -> bool:
    """Whether the step that is just over left the weights alone.

    GradScaler does not call other optimizers where gradients overflowed, but those that can look for themselves it
    does: the fused ones. Like GradScaler's own look, this one waits for the device.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
