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
from sharded_phema.layout import TALLY_MODULUS, ParamShard, ShardLayout, cut, tally, whole
from sharded_phema.world import agree, broadcast, gather, rank_and_size

__all__ = ["Facts", "Shared", "check_values", "facts_of", "numbered", "settled", "shared_out", "spread", "values_of"]

Facts = NDArray[np.uint64]
"""What a rank tells the others of each of its tensors; the columns are those of ``facts_of``."""

_BOXES, _COUNT, _TALLY, _STRIDED = range(4)


def settled(layout: ShardLayout, *, alike: bool = True) -> ShardLayout:
    """The layout with every shard's replica number, once the ranks are proved to fit together. Collective.

    Ranks that hold the same boxes of a tensor are its replicas, whatever made them so (replicated mesh axes,
    sub-meshes, DistributedDataParallel); the lowest of them is replica 0.

    Args:
        layout: Of this rank.
        alike: Whether replicas must hold the same values.

    Raises:
        UnsupportedModel: Elements are missing or held in two ways, or replicas hold different values.
    """
    everyone = np.stack(gather(agree(lambda: facts_of(layout))))
    layout = numbered(layout, everyone, rank_and_size()[0])
    if alike:
        check_values(layout, everyone, np.stack(gather(agree(lambda: values_of(layout)))))
    return layout


def facts_of(layout: ShardLayout) -> Facts:
    """For each tensor: which boxes are here, how many elements, their tally, and whether a view is not flat.

    Returns:
        (tensors, 4)
    """
    return np.array([_row(shard) for shard in layout], np.uint64).reshape(len(layout), 4)


def _row(shard: ParamShard) -> tuple[int, ...]:
    places = repr([(box.offsets, box.sizes) for box in shard.boxes]).encode()
    digest = int.from_bytes(hashlib.blake2b(places, digest_size=8).digest(), "little")
    count = sum(box.numel for box in shard.boxes)
    return digest, count, tally(shard.boxes), int(not shard.local.is_contiguous())


def numbered(layout: ShardLayout, everyone: Facts, rank: int) -> ShardLayout:
    """The layout of one rank with replica numbers, from the facts of all ranks; the same verdict on each.

    Args:
        layout: That rank's.
        everyone: (ranks, tensors, 4)
        rank: Which it is.

    Raises:
        UnsupportedModel: The ranks do not fit together.
    """
    found = []
    for index, shard in enumerate(layout):
        facts = everyone[:, index]
        _, firsts, groups = np.unique(facts[:, _BOXES], return_index=True, return_inverse=True)
        _check_alike(shard, facts[:, _STRIDED], firsts[groups], "different strides")
        _check_cover(shard, facts[firsts])
        mates = np.flatnonzero(groups == groups[rank])
        found.append(replace(shard, replica=int(np.searchsorted(mates, rank)), holders=len(mates)))
    return tuple(found)


def values_of(layout: ShardLayout) -> NDArray[np.uint64]:
    """Fingerprints of the shards that other ranks hold too, 0 for the others: (tensors,).

    Args:
        layout: Numbered.
    """
    # Buffers such as running statistics may differ between ranks; then the first rank's count.
    looked_at = [i for i, shard in enumerate(layout) if shard.holders > 1 and shard.kind != "buffer"]
    values = np.zeros(len(layout), np.uint64)
    values[looked_at] = fingerprints([layout[i] for i in looked_at])
    return values


def check_values(layout: ShardLayout, everyone: Facts, values: NDArray[np.uint64]) -> None:
    """Prove that replicas have equal values; the same verdict on each rank.

    Args:
        layout: Any rank's.
        everyone: (ranks, tensors, 4)
        values: (ranks, tensors)

    Raises:
        UnsupportedModel: They have not.
    """
    for index, shard in enumerate(layout):
        _, firsts, groups = np.unique(everyone[:, index, _BOXES], return_index=True, return_inverse=True)
        _check_alike(shard, values[:, index], firsts[groups], "different values")


def _check_alike(shard: ParamShard, told: NDArray[np.uint64], first: NDArray[np.intp], differing: str) -> None:
    """Compare what each rank told with the first that holds the same boxes."""
    odd = np.flatnonzero(told != told[first])
    if shard.kind != "buffer" and odd.size:
        raise UnsupportedModel(
            f"{shard.name}: ranks {first[odd[0]]} and {odd[0]} hold the same part of it with {differing}",
            hint="give all ranks the same weights before PostHocEMA is made, as DistributedDataParallel does; "
            "experts or stages that differ between ranks need names of their own",
        )


def _check_cover(shard: ParamShard, groups: Facts) -> None:
    """Prove that one of each group of replicas together hold every element once."""
    held, expected = sum(map(int, groups[:, _COUNT])), math.prod(shard.global_shape)
    if held != expected:
        found = f"the ranks hold {held} elements, the whole tensor {shard.global_shape} has {expected}"
    elif sum(map(int, groups[:, _TALLY])) % TALLY_MODULUS != tally([whole(shard.global_shape)]):
        found = f"boxes of different ranks overlap and leave elements out of the whole tensor {shard.global_shape}"
    else:
        return
    raise UnsupportedModel(
        f"{shard.name}: {found}",
        hint="shard the model so that its ranks hold every element, and the same boxes or disjoint ones",
    )


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that every rank holds whole, and which elements of it each rank averages.

    Attributes:
        name: Of the parameter.
        local: Alias of the whole tensor.
        ranges: Flat range of each rank; whole rows where no flat view reaches the tensor.
    """

    name: str
    local: Tensor
    ranges: tuple[tuple[int, int], ...]


def shared_out(layout: ShardLayout) -> tuple[ShardLayout, tuple[Shared, ...]]:
    """Leave to each rank an equal part of the parameters that all ranks hold; the rest is as it was.

    The parts are runs of the parameters laid end to end, so that most ranks keep most parameters whole or not at all.
    They are equal to one element, or to one row of a parameter that is not contiguous.

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
        ranges = tuple(_ranges(shard.local, start, edges))
        parts[shard.name] = _narrowed(shard, *ranges[rank])
        shared.append(Shared(shard.name, shard.local, ranges))
        start += shard.local.numel()
    return tuple(parts.get(shard.name, shard) for shard in layout), tuple(shared) if size > 1 else ()


def _ranges(local: Tensor, start: int, edges: Sequence[int]) -> list[tuple[int, int]]:
    """Elements of a tensor, which begins at ``start`` of all laid end to end, between each two edges."""
    length = local.numel()
    cuts = [min(max(edge - start, 0), length) for edge in edges]
    if not local.is_contiguous():
        row = length // local.shape[0]
        cuts = [place - place % row for place in cuts]
    return list(pairwise(cuts))


def _narrowed(shard: ParamShard, start: int, stop: int) -> ParamShard:
    if stop - start == shard.local.numel():
        return replace(shard, replica=0)
    current = shard.current
    return replace(
        shard,
        boxes=cut(shard.boxes, start, stop),
        local=_part(shard.local, start, stop),
        current=lambda: _part(current(), start, stop),
        replica=0,
    )


def _part(local: Tensor, start: int, stop: int) -> Tensor:
    """An alias of some elements of a tensor; of whole rows where it is not contiguous."""
    if local.is_contiguous():
        return local.view(-1)[start:stop]
    row = local.numel() // local.shape[0]
    return local[start // row : stop // row]


@torch.no_grad()
def spread(shared: Sequence[Shared]) -> None:
    """Bring every rank's part of shared tensors to all ranks, in place. Collective."""
    for tensor in shared:
        for source, (start, stop) in enumerate(tensor.ranges):
            if start == stop:
                continue
            part = _part(tensor.local, start, stop)
            sent = part.contiguous()
            broadcast(sent, source)
            if sent is not part:
                part.copy_(sent)
