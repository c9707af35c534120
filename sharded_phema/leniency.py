"""Leniency: what becomes of a snapshot that cannot be stored, as the user asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sharded_phema.errors import StoreError, TargetError

__all__ = ["Try", "leniency"]

Try = Callable[[Callable[[], object]], bool]
"""Does something, and tells whether that was done."""

_log = logging.getLogger(__name__)


def leniency(on_error: str) -> Try:
    """How to try: "raise" raises every failure, "warn" logs those of storage. No other mistake is ever passed over.

    Raises:
        TargetError: It is neither.
    """
    tries: dict[str, Try] = {"raise": _strict, "warn": _lenient}
    if on_error not in tries:
        raise TargetError(f'on_error: expected "raise" or "warn", found {on_error!r}', hint='try on_error="raise"')
    return tries[on_error]


def _strict(act: Callable[[], object]) -> bool:
    act()
    return True


def _lenient(act: Callable[[], object]) -> bool:
    try:
        act()
    except StoreError as error:
        _log.warning("a snapshot could not be stored, and training goes on without it: %s", error)
        return False
    return True
