"""Norms of this rank's part of the averages, from which readers learn how fast the weights moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from sharded_phema.layout import ShardLayout

__all__ = ["squared_norms"]

CHUNK = 1 << 18
"""Elements that are converted to float64 at a time."""


@torch.no_grad()
def squared_norms(averages: Sequence[ShardLayout]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Squared norm of the first replicas of each average, and of the difference of each pair of averages.

    Summed in float64, chunk by chunk, with one transfer from each device at the end. No collective.

    Args:
        averages: Shards of each average, the same parameters in each.

    Returns:
        Norms by average, and by pair in the order of ``itertools.combinations``; both empty where a number is not
        finite.
    """
    totals = _totals(averages)
    norms = [math.fsum(values) for values in zip(*totals, strict=True)] if totals else [0.0] * _count(len(averages))
    if not all(math.isfinite(norm) for norm in norms):
        return (), ()
    return tuple(norms[: len(averages)]), tuple(norms[len(averages) :])


def _totals(averages: Sequence[ShardLayout]) -> list[list[float]]:
    """Squared norms, one list per device: nothing waits for a device before all its work is queued."""
    sums: dict[torch.device, Tensor] = {}
    for locals_ in _stored(averages):
        device = locals_[0].device
        if device not in sums:
            sums[device] = torch.zeros(_count(len(averages)), dtype=torch.float64, device=device)
        for start in range(0, locals_[0].numel(), CHUNK):
            wide = [local[start : start + CHUNK].double() for local in locals_]
            products = [torch.dot(value, value) for value in wide]
            for a, b in combinations(wide, 2):
                gap = a - b
                products.append(torch.dot(gap, gap))
            sums[device] += torch.stack(products)
    return [total.tolist() for total in sums.values()]


def _stored(averages: Sequence[ShardLayout]) -> Iterator[list[Tensor]]:
    for shards in zip(*averages, strict=True):
        if shards[0].replica == 0 and shards[0].local.numel():
            yield [shard.local.reshape(-1) for shard in shards]


def _count(averages: int) -> int:
    return averages + averages * (averages - 1) // 2
