"""Rounding: the noise that storing an average in few bits adds to it."""

from __future__ import annotations

from sharded_phema.errors import TargetError

__all__ = ["STORED_BYTES", "UNIT_ROUNDOFF", "check_dtype", "rounding_noise"]

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding to nearest, by dtype; 2^-24 for float32, whose significand has 24 bits."""

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one stored number, by dtype."""


def check_dtype(dtype: object) -> None:
    """Prove that a dtype is one that averages can be stored in, by name.

    Raises:
        TargetError: It is not.
    """
    if not (isinstance(dtype, str) and dtype in STORED_BYTES):
        raise TargetError(
            f"dtype: expected one of {', '.join(STORED_BYTES)}, found {dtype!r}", hint='for example dtype="float32"'
        )


def rounding_noise(dtype: str, squared_norm: float) -> float:
    """Expected squared norm of the error of rounding a vector to a dtype: u^2 / 3 of its own squared norm.

    The errors of single numbers are taken as independent and uniform, up to u times each number.

    Raises:
        TargetError: Unknown dtype.
    """
    check_dtype(dtype)
    return UNIT_ROUNDOFF[dtype] ** 2 * squared_norm / 3.0
