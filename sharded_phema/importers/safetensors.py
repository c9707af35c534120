"""Safetensors files: their tensors by name, read from where they lie."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Lazy
from sharded_phema.importers.extent import Extent, strided
from sharded_phema.tensorfile import CODES

__all__ = ["open_safetensors"]

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_MAX_HEADER = 100_000_000  # the limit that the format sets


def open_safetensors(path: Path) -> dict[str, Lazy]:
    """Tensors of a file, in its order.

    Raises:
        StoreError: It is no such file, or damaged.
    """
    file = Extent.whole(path)
    try:
        length = int.from_bytes(file.part(0, 8).read(), "little")
        header = json.loads(bytes(file.part(8, min(length, _MAX_HEADER)).read()))
        numbers = file.part(8 + length, file.length - 8 - length)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _lazy(numbers, name, entry) for name, entry in entries.items()}
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path}: is no safetensors file: {error}", hint="it was cut short or damaged; take it from a backup"
        ) from error


def _lazy(numbers: Extent, name: str, entry: Any) -> Lazy:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in _DTYPES:
        raise StoreError(f"{numbers.path}: {name} is of {dtype}", hint=f"known are {', '.join(_DTYPES)}")
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return strided(numbers.part(begin, end - begin), _DTYPES[dtype], 0, shape, strides)
