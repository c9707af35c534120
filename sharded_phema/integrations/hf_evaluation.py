"""Evaluations of a Trainer that cover averages too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["also_with_averages"]


def also_with_averages(trainer: Trainer, swaps: Callable[[], Mapping[str, AbstractContextManager[None]]]) -> None:
    """Have ``trainer.evaluate`` evaluate averages after the weights.

    An event would not do: callbacks are not told which data is evaluated, and early stopping, which counts events,
    would count the evaluation of the weights and that of an average as two.

    Args:
        trainer: Whose method is wrapped. What its class defines is called, so that subclasses keep what they do.
        swaps: Gives, at each evaluation, what puts each average in the place of the weights, by the name that
            its metrics get: ``eval_ema_<name>_loss``.
    """
    evaluate = trainer.evaluate
    takes = inspect.signature(evaluate)
    within: list[bool] = []

    @functools.wraps(evaluate)
    def evaluate_all(*args: Any, **kwargs: Any) -> dict[str, float]:
        if within:  # several data sets are evaluated by a call for each, from within the call for all
            return evaluate(*args, **kwargs)
        within.append(True)
        try:
            metrics = evaluate(*args, **kwargs)
            for name, swapped in swaps().items():
                asked = _renamed(takes, args, kwargs, f"_ema_{name}")
                with swapped:
                    metrics |= evaluate(*asked.args, **asked.kwargs)
            return metrics
        finally:
            within.clear()

    trainer.evaluate = evaluate_all  # type: ignore[method-assign]


def _renamed(
    takes: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], suffix: str
) -> inspect.BoundArguments:
    """Arguments of an evaluation whose metrics get another name."""
    asked = takes.bind(*args, **kwargs)
    asked.apply_defaults()
    if "metric_key_prefix" not in asked.arguments:  # a subclass that hands on whatever it is given
        prefix = kwargs.get("metric_key_prefix", "eval")
        return takes.bind(*args, **kwargs | {"metric_key_prefix": prefix + suffix})
    asked.arguments["metric_key_prefix"] += suffix
    return asked
