"""Transcript: a record as versioned, sealed JSON, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, get_args, get_origin, get_type_hints

from sharded_phema.blocks import DIGEST_BYTES
from sharded_phema.errors import StoreError
from sharded_phema.manifest import VERSION, R, Record
from sharded_phema.seal import sealed, unsealed

__all__ = ["decode", "encode"]


def encode(record: Record) -> bytes:
    """Sealed JSON of a record; :func:`decode` gives back an equal record, floats to the last bit."""
    head = {"format": f"sharded_phema {type(record).__name__}", "version": VERSION}
    return sealed(head | _plain(record))


def decode(kind: type[R], text: bytes, where: object) -> R:
    """The record that a sealed text holds.

    Args:
        kind: Class of record to expect.
        text: What was read.
        where: The file, for messages.

    Raises:
        StoreError: The text is no such record, of another version, or damaged.
    """
    data = unsealed(text, where)
    try:
        head = {"format": data.pop("format"), "version": data.pop("version")}
        if head != {"format": f"sharded_phema {kind.__name__}", "version": VERSION}:
            raise ValueError(f"expected a {kind.__name__} of version {VERSION}, found {head}")
        record: R = _typed(kind, data, kind.__name__)
        return record
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"{where}: not a record of sharded_phema that this version reads: {error}",
            hint="the file was damaged or edited, or a newer version wrote it; restore it or upgrade",
        ) from error


def _plain(value: Any) -> Any:
    """A record as what JSON knows."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        # Edges of cuts come by the million.
        return list(value) if value and type(value[0]) in (int, str, float) else [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type, lists becoming tuples and objects becoming records."""
    if dataclasses.is_dataclass(hint):
        kind: Any = hint
        hints = _hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise ValueError(f"{where} needs exactly {sorted(hints)}, found {_shown(value)}")
        return kind(**{key: _typed(hints[key], value[key], f"{where}.{key}") for key in hints})
    if (item_hint := _item(hint)) is not None:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, found {_shown(value)}")
        # Edges of cuts come by the million.
        kinds = {*map(type, value)}
        if kinds == {item_hint} and (item_hint is str or (item_hint is int and min(value) >= 0)):
            return tuple(value)
        return tuple(_typed(item_hint, item, where) for item in value)
    return _digests(value, where) if hint is bytes else _scalar(hint, value, where)


@functools.cache
def _item(hint: Any) -> Any:
    """What a tuple holds; None for what is no tuple."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    # Parts of snapshots come by the thousand, and annotations are slow to look up.
    return get_type_hints(kind)


def _digests(value: Any, where: str) -> bytes:
    """Digests of blocks, which come by the million: one text, hexadecimal, in the one way in which it is written."""
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or len(found) % DIGEST_BYTES or found.hex() != value:
        digits = f"a multiple of {2 * DIGEST_BYTES} hexadecimal digits in lower case"
        raise ValueError(f"{where} must be a text of {digits}, found {_shown(value)}")
    return found


def _scalar(hint: type, value: Any, where: str) -> Any:
    # JSON writes 5.0 and 5 alike, and Python takes True for a number.
    fits = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not fits or isinstance(value, bool):
        raise ValueError(f"{where} must be {hint.__name__}, found {_shown(value)}")
    if hint is int and value < 0:
        raise ValueError(f"{where} must not be negative, found {value}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, found {value}")
    return hint(value)


def _shown(value: Any) -> str:
    text = sorted(value) if isinstance(value, dict) else repr(value)
    return f"{text!s:.200}"
