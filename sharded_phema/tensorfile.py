"""Tensor files: the header with which a safetensors file of one dtype begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

__all__ = ["DTYPES", "header_of"]

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}
"""Dtypes that can be written: their name in safetensors, and torch's."""


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """Everything before the numbers; these follow tensor by tensor without a gap, row-major and little-endian.

    Args:
        shapes: Shape of each tensor by its key, in the order of the file.
        dtype: A key of DTYPES.
        metadata: What the file says of itself.
    """
    code, kind = DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for key, shape in shapes.items():
        end = begin + math.prod(shape) * kind.itemsize
        entries[key] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the numbers, which must be aligned
    return len(text).to_bytes(8, "little") + text
