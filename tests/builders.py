"""Builders: cuts of small models into boxes, runs stored by simulated ranks, and trajectories to average."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar
from unittest import mock

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from sharded_phema.folder import open_folder
from sharded_phema.layout import Box, ParamShard, ShardLayout, boxes_of_flat_range, whole
from sharded_phema.manifest import LayoutRecord, Parameter, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import (
    commit_snapshot,
    create_run,
    here,
    layout_id,
    layout_record,
    snapshot_folder,
    squared_norms,
    start_session,
    write_part,
)

T = TypeVar("T")
Root: TypeAlias = str | Path
"""Path or URL of a run folder."""

LABELS = ("power:gamma=6", "power:gamma=16")

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def examples(count: int) -> settings:
    """Settings of a property test: the machine is shared, so that no example has a deadline."""
    return settings(max_examples=count, deadline=None)


@contextmanager
def no_flush() -> Iterator[None]:
    """Leave out fsync, which costs most of the time of a test and can only be seen to matter by pulling the plug."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


def listing(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder: equal where nothing was written."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def unclaimed(files: Mapping[str, T]) -> dict[str, T]:
    """A listing without the claims by which processes take turns: opening a run changes those and nothing else."""
    return {name: data for name, data in files.items() if "claims" not in Path(name).parts}


@st.composite
def boxes_in(draw, shape):
    """Any box of a tensor, empty ones included."""
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def divisions(draw, shape, ranks):
    """What each rank holds of one parameter: its boxes and its replica number."""
    box = whole(shape)
    kinds = ["flat", "copies", "one rank", *(["rows", "columns", "row copies"] if shape else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "copies":
        return [((box,), rank) for rank in range(ranks)]
    if kind == "one rank":
        owner = draw(st.integers(0, ranks - 1))
        return [((box,) if rank == owner else (), 0) for rank in range(ranks)]
    if kind == "flat":
        edges = _edges(draw, box.numel, ranks)
        return [(boxes_of_flat_range(shape, *edge), 0) for edge in edges]
    dim = len(shape) - 1 if kind == "columns" else 0
    groups = -(-ranks // 2) if kind == "row copies" else ranks
    slabs = [_slab(shape, dim, *edge) for edge in _edges(draw, shape[dim], groups)]
    return [(slabs[rank % groups], rank // groups) for rank in range(ranks)]


def _edges(draw, length, pieces):
    inner = sorted(draw(st.lists(st.integers(0, length), min_size=pieces - 1, max_size=pieces - 1)))
    return list(zip([0, *inner], [*inner, length], strict=True))


def _slab(shape, dim, begin, end):
    box = Box(
        tuple(begin if i == dim else 0 for i in range(len(shape))),
        tuple(end - begin if i == dim else n for i, n in enumerate(shape)),
    )
    return (box,) if box.numel else ()


@dataclass(frozen=True)
class Division:
    """A model cut over ranks: the shape of each parameter, and for each what every rank holds of it."""

    shapes: tuple[tuple[int, ...], ...]
    held: tuple[Sequence[tuple[tuple[Box, ...], int]], ...]

    @property
    def ranks(self) -> int:
        return len(self.held[0])

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(Parameter(f"layer.{i}.weight", shape) for i, shape in enumerate(self.shapes))

    def layout(self, rank: int, values: Sequence[np.ndarray]) -> ShardLayout:
        """The rank's shards, with a copy of their part of the values."""
        return tuple(
            shard(parameter.name, array, *held[rank])
            for parameter, array, held in zip(self.parameters, values, self.held, strict=True)
        )


@st.composite
def divided_models(draw, max_ranks=5):
    """Random shapes, each parameter cut in its own way."""
    ranks = draw(st.integers(1, max_ranks))
    model = tuple(draw(st.lists(shapes, min_size=1, max_size=4)))
    return Division(model, tuple(draw(divisions(shape, ranks)) for shape in model))


def rows_of(shape: tuple[int, ...], *counts: int) -> Division:
    """One parameter, of which each rank holds so many rows."""
    edges = np.cumsum([0, *counts]).tolist()
    return Division((shape,), ([(_slab(shape, 0, a, b), 0) for a, b in pairwise(edges)],))


def shard(name: str, array: np.ndarray, boxes: Sequence[Box], replica: int = 0) -> ParamShard:
    """A shard that holds the boxes of a whole array, end to end."""
    flat = np.concatenate([np.empty(0, np.float32), *(array[box.slices].ravel() for box in boxes)])
    local = torch.from_numpy(flat.astype(np.float32))
    return ParamShard(name, array.shape, tuple(boxes), local, lambda: local, replica=replica)


def numbers(shapes: Sequence[tuple[int, ...]], seed: int) -> list[np.ndarray]:
    """One float32 array for each shape."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def new_run(
    root: Root, division: Division, run: str = "run", labels: Sequence[str] = LABELS, *, dtype: str = "float32"
) -> RunRecord:
    """Make the folder of a run that tracks some averages."""
    record = RunRecord(run, "steps", tuple(labels), division.parameters, dtype=dtype)
    create_run(open_folder(root), record)
    return record


def new_session(root: Root, division: Division, name: str = "s0", parent: str = "", resumed_at: float = 0.0) -> None:
    """Record a session and what each of its ranks writes, as rank 0 does."""
    layout = layout_of(division)
    session = SessionRecord("run", name, parent, resumed_at, division.ranks, layout_id(layout))
    start_session(open_folder(root), session, layout)


def layout_of(division: Division, run: str = "run") -> LayoutRecord:
    """What each rank writes, as rank 0 gathers it."""
    values = [np.zeros(shape, np.float32) for shape in division.shapes]
    ranks = [here([division.layout(rank, values)]) for rank in range(division.ranks)]
    return layout_record(RunRecord(run, "steps", LABELS, division.parameters), ranks)


def store(
    root: Root,
    division: Division,
    averages: Mapping[str, Sequence[np.ndarray]],
    *,
    t: float,
    number: int = 0,
    session: str = "s0",
    ranks: Iterable[int] | None = None,
    dtype: str = "float32",
) -> str:
    """Have ranks write their parts of one snapshot, and rank 0 commit it where these are all ranks.

    Args:
        root: The run folder.
        division: What each rank holds.
        averages: Whole arrays of every average.
        t: Training time.
        number: Of the snapshot in its session.
        session: The session.
        ranks: Who writes; without them all do, and the snapshot is finished.
        dtype: What averages are rounded to.

    Returns:
        Where the snapshot lies, or would.
    """
    folder, record = open_folder(root), SnapshotRecord("run", session, number, t, 1.0, ())
    parts, norms, gaps = [], [], []
    for rank in range(division.ranks) if ranks is None else ranks:
        layouts = {label: division.layout(rank, values) for label, values in averages.items()}
        parts.append(write_part(folder, record, rank, layouts, dtype=dtype))
        for found, sums in zip(squared_norms(tuple(layouts.values())), (norms, gaps), strict=True):
            sums.append(found)
    if ranks is None:
        added = [tuple(map(math.fsum, zip(*sums, strict=True))) if all(sums) else () for sums in (norms, gaps)]
        commit_snapshot(folder, replace(record, parts=tuple(parts), norms=added[0], gaps=added[1]))
    return f"{folder.url}/{snapshot_folder(session, number)}"


def averages_of(division: Division, seed: int) -> dict[str, list[np.ndarray]]:
    """Random values for every tracked average."""
    return {label: numbers(division.shapes, seed + i) for i, label in enumerate(LABELS)}


class Free(nn.Module):
    """A model whose parameters a test sets by hand."""

    def __init__(self, dtype: torch.dtype = torch.float32, **sizes: int | tuple[int, ...]) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=dtype)))

    @torch.no_grad()
    def set(self, **values) -> None:
        """Overwrite parameters in place, as an optimizer does."""
        for name, value in values.items():
            self.get_parameter(name).copy_(torch.as_tensor(value))


def tensors_of(folder: Root) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, read with the library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return found


def lay(target: torch.Tensor, boxes: Sequence[Box], values: torch.Tensor) -> None:
    """Write values, which are boxes end to end, into the whole tensor."""
    start = 0
    for box in boxes:
        target[box.slices] = values.reshape(-1)[start : start + box.numel].view(box.sizes)
        start += box.numel


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # numpy has no bfloat16, and torch no view of a 0-d tensor as bytes.
    return not a.numel() or torch.equal(*(x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))
