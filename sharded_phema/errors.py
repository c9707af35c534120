"""Errors: what went wrong, where, what was expected and found, and the mend.

PhemaError
|-- TargetError         a target, width or profile that cannot be
|-- ForecastError       the stored averages cannot rebuild the target well enough
|-- UnsupportedModel    a parameter that cannot be mapped to local shards
|-- ModelMismatch       a model, run folder or state that does not belong to the other
|-- OrderError          a call at the wrong moment: time running backwards, a nested swap
|-- StoreError          a run folder that is missing, unfinished, damaged or foreign
`-- OutputError         an output that must not or cannot be written
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

__all__ = [
    "ForecastError",
    "ModelMismatch",
    "OrderError",
    "OutputError",
    "PhemaError",
    "StoreError",
    "TargetError",
    "UnsupportedModel",
    "check_number",
]


class PhemaError(ValueError):
    """A mistake that the caller can mend.

    Args:
        message: What is wrong, where, what was expected and what was found.
        hint: What to do about it.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes; a keyword-only argument does not survive the default.
        return (_rebuild, (type(self), self.message, self.hint))


class TargetError(PhemaError):
    """A target, width or profile that cannot be."""


class ForecastError(PhemaError):
    """The stored averages cannot rebuild the target well enough."""


class UnsupportedModel(PhemaError):
    """A parameter that cannot be mapped to local shards."""


class ModelMismatch(PhemaError):
    """A model, run folder or state that does not belong to the other."""


class OrderError(PhemaError):
    """A call at the wrong moment."""


class StoreError(PhemaError):
    """A run folder that is missing, unfinished, damaged or foreign."""


class OutputError(PhemaError):
    """An output that must not or cannot be written."""


def check_number(value: object, name: str, expected: str, inside: Callable[[float], bool], mend: str) -> None:
    """Prove that an argument is a finite number in its range.

    Args:
        value: The argument.
        name: What it is called.
        expected: The range, in words.
        inside: Whether a number is in the range.
        mend: What to do about it.

    Raises:
        TargetError: It is not.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and inside(value)):  # type: ignore[arg-type]
        raise TargetError(f"{name} must be a number {expected}, found {value!r}", hint=mend)


def _rebuild(kind: type[PhemaError], message: str, hint: str) -> PhemaError:
    return kind(message, hint=hint)
