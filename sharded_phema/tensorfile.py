"""Tensor files: which dtypes safetensors can hold, and the header with which such a file begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["CODES", "DTYPES", "dtype_name", "header_of", "torch_dtype"]

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}
"""Dtypes that averages can be written in: their name in safetensors, and torch's."""

CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Dtypes that a tensor can be stored in as it is: torch's name of each, and that of safetensors."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in records; it may be none of CODES."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in CODES."""
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def header_of(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Everything before the numbers, and where the numbers go: row-major, little-endian, without a gap.

    Tensors with the widest elements come first, so that all lie at multiples of their elements' width; otherwise
    they keep their order.

    Args:
        tensors: Shape and dtype, a key of CODES, of each tensor by its key.
        metadata: What the file says of itself.

    Returns:
        The header, and for each key, in the order of the file, the byte of the file at which its numbers begin.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, begin = {}, 0
    for key in sorted(tensors, key=lambda key: -torch_dtype(tensors[key][1]).itemsize):
        shape, dtype = tensors[key]
        end = begin + math.prod(shape) * torch_dtype(dtype).itemsize
        entries[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begins[key], begin = begin, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the numbers, which must be aligned
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + first for key, first in begins.items()}
