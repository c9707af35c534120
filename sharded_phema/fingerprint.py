"""Fingerprint: a number that tells whether a tensor changed, added up over its pieces however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_phema.layout import Box, ParamShard, flattened

__all__ = ["MODULUS", "fingerprints"]

MODULUS = 1 << 64
"""Fingerprints of the pieces of a tensor add up, modulo this, to that of the tensor."""

CHUNK = 1 << 18
"""Elements that are looked at at a time."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so that multiplying loses nothing; from the digits of the golden ratio, e and pi.
_PLACE, _FIRST, _SECOND = -0x61C8864680B583EB, 0x2B7E151628AED2A7, 0x243F6A8885A308D3
_LOW = (1 << 35) - 1


@torch.no_grad()
def fingerprints(shards: Sequence[ParamShard]) -> list[int]:
    """The fingerprint of each shard: of the bits of its elements and their places in the whole tensor.

    A tensor in which a single bit changed always has another; otherwise two tensors that differ agree once in about
    2^64. Nothing that is made is longer than a chunk, but for a copy of what is not contiguous, and each device is
    waited for once. No collective.
    """
    sums = [_fingerprint(shard) for shard in shards]
    found = [0] * len(sums)
    for device in dict.fromkeys(total.device for total in sums):
        places = [index for index, total in enumerate(sums) if total.device == device]
        for index, value in zip(places, torch.stack([sums[i] for i in places]).tolist(), strict=True):
            found[index] = value % MODULUS
    return found


def _fingerprint(shard: ParamShard) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=shard.local.device)
    flat, start = shard.local.reshape(-1), 0
    for box in shard.boxes:
        for first in range(0, box.numel, CHUNK):
            last = min(first + CHUNK, box.numel)
            places = _places(box, shard.global_shape, first, last, flat.device)
            total += _mixed(_bits(flat[start + first : start + last]), places)
        start += box.numel
    return total


def _bits(flat: Tensor) -> Tensor:
    """The bits of each element as an integer."""
    if flat.element_size() in _BITS:
        return flat.view(_BITS[flat.element_size()])
    halves = torch.view_as_real(flat).view(torch.int64)  # complex128
    return halves[:, 0] ^ _folded(halves[:, 1] * _FIRST)


def _places(box: Box, shape: Sequence[int], first: int, last: int, device: torch.device) -> Tensor:
    """Positions in the flattened tensor of the elements ``[first, last)`` of a box."""
    inner = torch.arange(first, last, device=device)
    if (run := flattened(box, shape)) is not None:
        return inner.add_(run.offsets[0])
    places, stride = torch.zeros_like(inner), 1
    for dim in reversed(range(len(shape))):
        places += (inner % box.sizes[dim] + box.offsets[dim]) * stride
        inner, stride = inner // box.sizes[dim], stride * shape[dim]
    return places


def _mixed(bits: Tensor, places: Tensor) -> Tensor:
    """Sum of a one-to-one mixture of each element's bits, another one for each place."""
    mixed = _folded(places.mul_(_PLACE).bitwise_xor_(bits)).mul_(_FIRST)
    return _folded(mixed).mul_(_SECOND).sum()


def _folded(mixed: Tensor) -> Tensor:
    """Let the high bits reach the low ones, which multiplying alone does not: two signs flipped would cancel."""
    # Without the copies of the sign that the shift brings in, no two numbers become one.
    return mixed.bitwise_xor_((mixed >> 29) & _LOW)
