"""Fake worlds: what each of many ranks holds of each tensor of a model, in one process and without a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from unittest import mock

import numpy as np
import torch
from builders import divisions, lay
from hypothesis import strategies as st
from torch import Tensor

from sharded_phema import replicas
from sharded_phema.backends.fsdp2 import Split, boxes_of, runs_on_mesh
from sharded_phema.layout import Box, ParamShard, ShardLayout, boxes_of_flat_range, whole
from sharded_phema.posthoc import PostHocEMA

Holding = list[tuple[Box, ...]]
"""The boxes of one tensor that each rank holds."""


@dataclass(frozen=True, slots=True)
class World:
    """Whole tensors by name, and each rank's layout of them. No two ranks share memory."""

    tensors: dict[str, Tensor]
    layouts: list[ShardLayout]

    def facts(self) -> np.ndarray:
        """What the ranks tell each other. (ranks, tensors, columns)"""
        return np.stack([replicas.facts_of(layout) for layout in self.layouts])

    def settled(self) -> list[ShardLayout]:
        """Each rank's layout with replica numbers."""
        everyone = self.facts()
        layouts = [replicas.numbered(layout, everyone, rank) for rank, layout in enumerate(self.layouts)]
        values = np.stack([replicas.values_of(layout) for layout in layouts])
        for layout in layouts:
            replicas.check_values(layout, everyone, values)
        return layouts


def shard_of(tensor: Tensor, boxes: tuple[Box, ...], *, name: str = "w", kind: str = "trained") -> ParamShard:
    """A rank's piece of a tensor; a single box keeps its shape and, where it is all of the tensor, its strides."""
    pieces = [tensor[box.slices] for box in boxes]
    # A plain clone drops the strides of some tensors that are not dense.
    flat = torch.cat([tensor.new_empty(0), *(piece.reshape(-1) for piece in pieces)])
    local = pieces[0] if boxes == (whole(tensor.shape),) else flat.view(boxes[0].sizes) if len(boxes) == 1 else flat
    return ParamShard(name, tuple(tensor.shape), boxes, local, lambda: local, kind)


@st.composite
def cuts(draw, shape, pieces):
    """Boxes that are disjoint and cover a tensor, in some pieces."""
    return [boxes for boxes, replica in draw(divisions(shape, pieces)) if replica == 0]


def random_world(seed: int, ranks: int, tensors: int) -> World:
    """Tensors of awkward shapes, each placed in a way of its own."""
    rng = Random(seed)
    values, places, kinds = {}, {}, {}
    for index in range(tensors):
        shape = tuple(rng.choice([0, 1, 1, 2, 3, 5, 7, 8]) for _ in range(rng.choice([0, 1, 2, 2, 3])))
        values[f"t{index}"] = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        places[f"t{index}"] = random_holding(rng, shape, ranks)
        kinds[f"t{index}"] = rng.choice(["trained", "trained", "trained", "frozen", "buffer"])
    layouts = [
        tuple(shard_of(values[name].clone(), places[name][rank], name=name, kind=kinds[name]) for name in values)
        for rank in range(ranks)
    ]
    return World(values, layouts)


def random_holding(rng: Random, shape: tuple[int, ...], ranks: int) -> Holding:
    """Where the ranks' pieces of one tensor lie: everywhere, on a mesh of some of the ranks, or in flat ranges."""
    return rng.choice([_copies, _on_mesh, _on_mesh, _flat])(rng, shape, ranks)


def _copies(rng: Random, shape: tuple[int, ...], ranks: int) -> Holding:
    return [(whole(shape),)] * ranks


def _flat(rng: Random, shape: tuple[int, ...], ranks: int) -> Holding:
    """Equal ranges with padding at the end, as FSDP1 and ZeRO cut them, or edges anywhere; perhaps by fewer ranks."""
    length, parts = math.prod(shape), rng.randint(1, ranks)
    step = -(-length // parts)
    edges = [min(step * r, length) for r in range(parts + 1)]
    if rng.random() < 0.5:
        edges = [0, *sorted(rng.randint(0, length) for _ in range(parts - 1)), length]
    held = [boxes_of_flat_range(shape, a, b) for a, b in itertools.pairwise(edges)]
    # The others hold the same again (hybrid sharding) or, where they do not go round, nothing.
    rounds = 1 if rng.random() < 0.5 else ranks // parts
    held = held * rounds + [()] * (ranks - parts * rounds)
    rng.shuffle(held)
    return held


def _on_mesh(rng: Random, shape: tuple[int, ...], ranks: int) -> Holding:
    mesh = random_mesh(rng, ranks)
    splits = random_splits(rng, shape, mesh)
    places = list(itertools.product(*map(range, mesh)))
    held = [boxes_of(runs_on_mesh(shape, splits, place)) for place in places]
    if None in held:
        return _flat(rng, shape, ranks)
    held += [()] * (ranks - len(held))
    rng.shuffle(held)
    return held


def random_mesh(rng: Random, ranks: int) -> tuple[int, ...]:
    """One to three axes that need at most so many ranks."""
    while True:
        mesh = tuple(rng.choice([1, 2, 2, 3, 4, ranks]) for _ in range(rng.randint(1, 3)))
        if math.prod(mesh) <= ranks:
            return mesh


def random_splits(rng: Random, shape: tuple[int, ...], mesh: tuple[int, ...]) -> list[Split]:
    """Replicas, shards and strided shards, in any order."""
    dims = [None, *range(len(shape)), *range(len(shape))]
    return [Split(count, rng.choice(dims), rng.choice([1, 1, 2, 3])) for count in mesh]


Piece = tuple[str, tuple[int, ...], tuple[Box, ...], Tensor]
"""Name, global shape, boxes and values: what a rank sends to be laid together with others."""


def averages_here(ema: PostHocEMA) -> list[Piece]:
    """This rank's pieces of every average."""
    return [
        (f"{label} {shard.name}", shard.global_shape, shard.boxes, shard.local.clone())
        for label, layout in ema._averages_by_label().items()
        for shard in layout
    ]


def laid_together(ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks; elements that nobody holds are NaN."""
    tensors: dict[str, Tensor] = {}
    for name, shape, boxes, values in itertools.chain.from_iterable(ranks):
        lay(tensors.setdefault(name, torch.full(shape, torch.nan)), boxes, values)
    return tensors


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and bit for bit the same values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@contextmanager
def seen_by(rank: int, size: int) -> Iterator[None]:
    """Let ``replicas`` believe that it runs on one rank of a world."""
    with mock.patch.object(replicas, "rank_and_size", lambda: (rank, size)):
        yield


def spread_everywhere(shared: list[tuple[replicas.Shared, ...]]) -> None:
    """Run ``spread`` on all ranks: first collect what each source sends, then hand it to the others."""
    mail: dict[int, Tensor] = {}
    for filling in (False, True):
        for rank, tensors in enumerate(shared):
            calls = itertools.count()

            def broadcast(tensor: Tensor, source: int, rank: int = rank, calls=calls, filling=filling) -> None:
                call = next(calls)
                assert tensor.is_contiguous(), "what process groups expect"
                if filling:
                    assert tensor.numel() == mail[call].numel()
                    tensor.copy_(mail[call].view(tensor.shape))
                elif rank == source:
                    mail[call] = tensor.clone()

            with mock.patch.object(replicas, "broadcast", broadcast):
                replicas.spread(tensors)
            assert next(calls) == len(mail) or not filling
