"""Seal: JSON text that ends in a digest of itself, so that no byte of a record changes unseen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from sharded_phema.errors import StoreError

__all__ = ["sealed", "unsealed"]

_OPENING, _CLOSING = b',"digest":"', b'"}\n'
_DIGITS = 32
_TAIL = len(_OPENING) + _DIGITS + len(_CLOSING)


def sealed(data: Mapping[str, Any]) -> bytes:
    """Compact JSON of an object, with one more member at its end: the XXH3-128 digest of all bytes before it.

    Args:
        data: Not empty, without a member ``digest``; NaN and infinity are refused.
    """
    body = json.dumps(data, separators=(",", ":"), allow_nan=False).encode().removesuffix(b"}")
    return body + _OPENING + xxhash.xxh3_128_hexdigest(body).encode() + _CLOSING


def unsealed(text: bytes, where: object) -> dict[str, Any]:
    """The object in a sealed text, without its digest.

    Args:
        text: What was read.
        where: The file, for messages.

    Raises:
        StoreError: Not a single byte may have changed, and some have; or it never was such a text.
    """
    body, tail = text[:-_TAIL], text[-_TAIL:]
    expected = _OPENING + xxhash.xxh3_128_hexdigest(body).encode() + _CLOSING
    try:
        if tail != expected:
            raise ValueError(f"expected it to end in {expected!r}, found {tail!r:.100}")
        data = json.loads(body + b"}", parse_constant=_refuse_constant)
        if not isinstance(data, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{where}: the record is damaged: {error}",
            hint="the file was cut short, edited or hit by a disk error; restore it from a backup",
        ) from error
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
