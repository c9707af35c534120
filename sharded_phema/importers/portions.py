"""Portions: a model cut into parts that fit a budget of memory, each of which is stored as a rank of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sharded_phema.importers.agreement import Model
from sharded_phema.importers.contract import Tensors
from sharded_phema.layout import ParamShard, ShardLayout, boxes_of_flat_range
from sharded_phema.tensorfile import torch_dtype

__all__ = ["Portion", "empty_shards", "portions", "shards_of"]


@dataclass(frozen=True, slots=True)
class Portion:
    """What one rank stores.

    Attributes:
        ranges: Of each tensor of the model, averaged ones first, the elements ``[start, stop)``; often none.
        nbytes: Bytes of it in memory.
    """

    ranges: tuple[tuple[int, int], ...]
    nbytes: int


def portions(model: Model, budget: int) -> tuple[Portion, ...]:
    """Parts of at most so many bytes, in the order of the model; tensors are cut between rows where rows fit.

    Args:
        model: What is stored.
        budget: Bytes of all averages of a part in memory.
    """
    tensors = [(p.shape, model.dtypes[p.name], len(model.averages)) for p in model.parameters]
    tensors += [(raw.shape, raw.dtype, 1) for raw in model.copied]
    parts, part, left = [], [(0, 0)] * len(tensors), budget
    for index, (shape, dtype, copies) in enumerate(tensors):
        start, numel, width = 0, math.prod(shape), copies * torch_dtype(dtype).itemsize
        while start < numel:
            stop = _stop(shape, start, numel, left // width, left == budget)
            if stop == start:
                parts.append(Portion(tuple(part), budget - left))
                part, left = [(0, 0)] * len(tensors), budget
                continue
            part[index] = (start, stop)
            left -= (stop - start) * width
            start = stop
            if start < numel:
                parts.append(Portion(tuple(part), budget - left))
                part, left = [(0, 0)] * len(tensors), budget
    return (*parts, Portion(tuple(part), budget - left))


def _stop(shape: Sequence[int], start: int, numel: int, room: int, is_empty: bool) -> int:
    """Where the elements from ``start`` on end that fit; whole rows, unless not even one fits an empty part."""
    if numel - start <= room:
        return numel
    row = math.prod(shape[1:])
    rows = (start + room) // row * row
    if rows > start:
        return rows
    return start + max(room, 1) if is_empty else start


def shards_of(model: Model, portion: Portion, tensors: Tensors, *, copied: bool = False) -> ShardLayout:
    """A portion's shards of one average, or of what is copied, with their numbers."""
    count = len(model.parameters)
    names = [raw.name for raw in model.copied] if copied else [p.name for p in model.parameters]
    ranges = portion.ranges[count:] if copied else portion.ranges[:count]
    return tuple(_shard(name, tensors, start, stop) for name, (start, stop) in zip(names, ranges, strict=True))


def _shard(name: str, tensors: Tensors, start: int, stop: int) -> ParamShard:
    lazy = tensors[name]
    local = lazy.read(start, stop) if start < stop else torch.empty(0, dtype=torch_dtype(lazy.dtype))
    assert local.numel() == stop - start, name
    return ParamShard(name, lazy.shape, boxes_of_flat_range(lazy.shape, start, stop), local, lambda: local)


def empty_shards(model: Model, portion: Portion) -> tuple[ShardLayout, ShardLayout]:
    """The same without numbers, averaged and copied: what a layout is made of."""
    nothing, count = torch.empty(0), len(model.parameters)
    shapes = [(p.name, p.shape) for p in model.parameters] + [(raw.name, raw.shape) for raw in model.copied]
    shards = tuple(
        ParamShard(name, shape, boxes_of_flat_range(shape, *extent), nothing, lambda: nothing)
        for (name, shape), extent in zip(shapes, portion.ranges, strict=True)
    )
    return shards[:count], shards[count:]
