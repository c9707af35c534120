"""Replicas: which ranks hold the same pieces, which of them writes, and how pieces that all hold are shared out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_phema.errors import UnsupportedModel
from sharded_phema.fingerprint import fingerprints
from sharded_phema.layout import ParamShard, ShardLayout, cut
from sharded_phema.world import agree, broadcast, gather, rank_and_size

__all__ = ["Shared", "settled", "shared_out", "spread"]

Table = NDArray[np.uint64]


def settled(layout: ShardLayout) -> ShardLayout:
    """The layout with every shard's replica number, once the ranks are proved to fit together. Collective.

    Ranks that hold the same boxes of a tensor are its replicas, whatever made them so (replicated mesh axes,
    sub-meshes, DistributedDataParallel); the lowest of them is replica 0.

    Raises:
        UnsupportedModel: Elements are missing or held in two ways, or replicas hold different values.
    """
    everyone = np.stack(gather(agree(lambda: _table(layout))))  # (ranks, tensors, 3)
    rank, found = rank_and_size()[0], []
    for index, shard in enumerate(layout):
        groups = _groups(shard, everyone[:, index])
        mates = next(group for group in groups if rank in group)
        found.append(replace(shard, replica=mates.index(rank), holders=len(mates)))
    return tuple(found)


def _table(layout: ShardLayout) -> Table:
    marks = _marks(layout)
    facts = [_facts(shard, mark) for shard, mark in zip(layout, marks, strict=True)]
    return np.array(facts, np.uint64).reshape(len(layout), 3)


def _marks(layout: ShardLayout) -> list[int]:
    # Buffers such as running statistics may differ between ranks; then the first rank's count.
    params = [shard for shard in layout if shard.kind != "buffer"]
    marks = iter(fingerprints(params))
    return [0 if shard.kind == "buffer" else next(marks) for shard in layout]


def _facts(shard: ParamShard, mark: int) -> tuple[int, int, int]:
    """What this rank holds, how many elements that is, and which values."""
    places = repr([(box.offsets, box.sizes) for box in shard.boxes]).encode()
    digest = hashlib.blake2b(places, digest_size=8).digest()
    return int.from_bytes(digest, "little"), sum(box.numel for box in shard.boxes), mark


def _groups(shard: ParamShard, facts: Table) -> list[list[int]]:
    """Ranks that hold the same boxes, each group in order, for one tensor: (ranks, 3)."""
    _, firsts, which = np.unique(facts[:, 0], return_index=True, return_inverse=True)
    groups = [np.flatnonzero(which == i).tolist() for i in range(len(firsts))]
    for group in groups:
        differing = [rank for rank in group if facts[rank, 2] != facts[group[0], 2]]
        if differing:
            raise UnsupportedModel(
                f"{shard.name}: ranks {group[0]} and {differing[0]} hold the same part of it with different values",
                hint="give all ranks the same weights before PostHocEMA is made, as DistributedDataParallel does; "
                "experts or stages that differ between ranks need names of their own",
            )
    held = int(facts[firsts, 1].sum())
    if held != math.prod(shard.global_shape):
        raise UnsupportedModel(
            f"{shard.name}: the ranks hold {held} elements, the whole tensor {shard.global_shape} "
            f"has {math.prod(shard.global_shape)}",
            hint="shard the model so that its ranks hold every element, and the same boxes or disjoint ones",
        )
    return groups


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that every rank holds whole, and which elements of it each rank averages.

    Attributes:
        name: The tensor's name.
        local: Alias of the whole tensor.
        ranges: Flat range of each rank; for a tensor that no flat view reaches all or nothing.
    """

    name: str
    local: Tensor
    ranges: tuple[tuple[int, int], ...]


def shared_out(layout: ShardLayout) -> tuple[ShardLayout, tuple[Shared, ...]]:
    """Leave to each rank an equal part of the parameters that all ranks hold; the rest is as it was.

    The parts are runs of the parameters laid end to end, so that most ranks keep most parameters whole or not at all.

    Args:
        layout: Settled.
    """
    rank, size = rank_and_size()
    everywhere = [s for s in layout if s.holders == size and s.kind != "buffer" and s.local.numel()]
    total, start = sum(shard.local.numel() for shard in everywhere), 0
    edges = [total * r // size for r in range(size + 1)]
    parts: dict[str, ParamShard] = {}
    shared = []
    for shard in everywhere:
        ranges = tuple(_ranges(shard, start, edges))
        parts[shard.name] = _narrowed(shard, *ranges[rank])
        shared.append(Shared(shard.name, shard.local, ranges))
        start += shard.local.numel()
    return tuple(parts.get(shard.name, shard) for shard in layout), tuple(shared) if size > 1 else ()


def _ranges(shard: ParamShard, start: int, edges: Sequence[int]) -> list[tuple[int, int]]:
    """Elements of a shard, which begins at ``start`` of all parameters laid end to end, between each two edges."""
    length = shard.local.numel()
    cuts = [min(max(edge - start, 0), length) for edge in edges]
    if not shard.local.is_contiguous():
        # Held by the one who has its first element: no flat alias reaches a part of it.
        cuts = [length if cut else 0 for cut in cuts]
    return list(pairwise(cuts))


def _narrowed(shard: ParamShard, start: int, stop: int) -> ParamShard:
    if stop - start == shard.local.numel():
        return replace(shard, replica=0)
    current = shard.current

    def part(whole: Tensor) -> Tensor:
        return whole.reshape(-1)[start:stop]

    boxes = cut(shard.boxes, start, stop)
    return replace(shard, boxes=boxes, local=part(shard.local), current=lambda: part(current()), replica=0)


@torch.no_grad()
def spread(shared: Sequence[Shared]) -> None:
    """Bring every rank's part of shared tensors to all ranks, in place. Collective."""
    for tensor in shared:
        for source, (start, stop) in enumerate(tensor.ranges):
            if start == stop:
                continue
            if tensor.local.is_contiguous():
                broadcast(tensor.local.view(-1)[start:stop], source)
            else:
                whole = tensor.local.contiguous()
                broadcast(whole, source)
                tensor.local.copy_(whole)
