"""Made runs: run folders of a transformer's shape and any size, as a training of tiled walks would have left them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sharded_phema.folder import open_folder
from sharded_phema.layout import Box, ParamShard, ShardLayout
from sharded_phema.manifest import Parameter, Part, RunRecord, SessionRecord, SnapshotRecord
from sharded_phema.store import (
    commit_snapshot,
    create_run,
    here,
    layout_id,
    layout_record,
    squared_norms,
    start_session,
    write_part,
)
from sharded_phema.tensorfile import torch_dtype
from tiled import START, Walks, walked

__all__ = ["Made", "Recipe", "made_run", "transformer", "whole_average"]

SESSION = "0" * 12
# Share of the parameters that are in blocks; the rest is the embedding, which makes the number exact to a row.
_IN_BLOCKS = 0.8


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run is made of.

    Attributes:
        parameters: Of the model.
        snapshots: How many are stored, at equal distances.
        ranks: Who wrote them, each its rows of every tensor.
        sigma_rels: Stored averages.
        dtype: In which they are stored.
        targets: Widths that are to be rebuilt.
        steps: From one snapshot to the next.
    """

    parameters: int
    snapshots: int
    ranks: int
    sigma_rels: tuple[float, ...]
    dtype: str
    targets: tuple[str, ...]
    steps: int = 32


@dataclass(frozen=True, slots=True)
class Made:
    """A run that lies in a folder: the run itself in ``root``, and beside it what its weights were."""

    folder: Path
    recipe: Recipe

    @property
    def root(self) -> Path:
        """The run folder."""
        return self.folder / "ema"

    @property
    def walks(self) -> Walks:
        """The weights and their averages."""
        return Walks.load(self.folder / "walks.npz")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Names and shapes of the model."""
        return transformer(self.recipe.parameters)


def transformer(parameters: int) -> tuple[Parameter, ...]:
    """Tensors of a transformer of about so many parameters: large matrices, and as many short vectors."""
    layers = 48 if parameters >= 10**9 else 12 if parameters >= 5 * 10**7 else 6 if parameters >= 10**6 else 2
    width = max(16, int((_IN_BLOCKS * parameters / (12 * layers)) ** 0.5) // 16 * 16)
    vectors = {"ln1.weight": 1, "ln1.bias": 1, "qkv.bias": 3, "proj.bias": 1, "ln2.weight": 1, "ln2.bias": 1}
    vectors |= {"up.bias": 4, "down.bias": 1}
    matrices = {"qkv.weight": (3, 1), "proj.weight": (1, 1), "up.weight": (4, 1), "down.weight": (1, 4)}
    block = {name: (k * width,) for name, k in vectors.items()}
    shapes: dict[str, tuple[int, ...]] = {**block, **{n: (a * width, b * width) for n, (a, b) in matrices.items()}}
    blocks = [Parameter(f"blocks.{i}.{name}", shape) for i in range(layers) for name, shape in shapes.items()]
    left = parameters - sum(math.prod(parameter.shape) for parameter in blocks)
    return (Parameter("embedding.weight", (max(left // width, 1), width)), *blocks)


def made_run(folder: Path, recipe: Recipe) -> Made:
    """Write a run with the package's own writers, a rank and a snapshot at a time; kept where it lies there already.

    At most one rank's part of one snapshot is in memory, in float32 and rounded.
    """
    note, made = folder / "made.json", Made(folder, recipe)
    text = json.dumps(asdict(recipe))
    if note.exists() and note.read_text() == text:
        return made
    assert not made.root.exists(), f"{made.root} holds another run; give another --folder"
    folder.mkdir(parents=True, exist_ok=True)
    walks = walked(recipe.sigma_rels, [float(text) for text in recipe.targets], recipe.snapshots, recipe.steps)
    walks.save(folder / "walks.npz")
    _write(made, walks)
    note.write_text(text)  # last: a run that was cut short is not found again
    return made


def _write(made: Made, walks: Walks) -> None:
    recipe, folder = made.recipe, open_folder(made.root)
    labels = tuple(map(str, recipe.sigma_rels))
    run = RunRecord("r" * 32, "steps", dtype=recipe.dtype, averages=labels, parameters=made.parameters)
    create_run(folder, run)
    layout = layout_record(run, [here([_shards(run, rank, recipe.ranks)]) for rank in range(recipe.ranks)])
    session = SessionRecord(run.run, SESSION, "", 0.0, recipe.ranks, layout_id(layout))
    start_session(folder, session, layout)
    for number, t in enumerate(walks.times.tolist()):
        record = SnapshotRecord(run.run, SESSION, number, t, START, ())
        parts: list[Part] = []
        norms: list[tuple[float, ...]] = []
        gaps: list[tuple[float, ...]] = []
        for rank in range(recipe.ranks):
            empty = _shards(run, rank, recipe.ranks)
            held = {label: _filled(empty, walks, number, k) for k, label in enumerate(labels)}
            # Rounded here: the writer would look for overflow, which takes as long as all the rest.
            rounded = {label: _rounded(shards, torch_dtype(run.dtype)) for label, shards in held.items()}
            parts.append(write_part(folder, record, rank, rounded, dtype=run.dtype))
            for sums, found in zip((norms, gaps), squared_norms(tuple(held.values())), strict=True):
                sums.append(found)
        added = [tuple(map(math.fsum, zip(*sums, strict=True))) for sums in (norms, gaps)]
        commit_snapshot(folder, replace(record, parts=tuple(parts), norms=added[0], gaps=added[1]))


def _shards(run: RunRecord, rank: int, ranks: int) -> ShardLayout:
    """A rank's rows of every tensor, without numbers."""
    found, nothing = [], torch.empty(0)
    for parameter in run.parameters:
        rows, *others = parameter.shape
        chunk = -(-rows // ranks)
        begin, end = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
        boxes = (Box((begin, *(0 for _ in others)), (end - begin, *others)),) if begin < end else ()
        found.append(ParamShard(parameter.name, parameter.shape, boxes, nothing, lambda: nothing))
    return tuple(found)


def _filled(shards: ShardLayout, walks: Walks, snapshot: int, average: int) -> ShardLayout:
    """The shards with the numbers of a stored average."""
    found, begin = [], 0
    for shard in shards:
        row, numel = math.prod(shard.global_shape[1:]), math.prod(shard.global_shape)
        for box in shard.boxes:
            values = walks.stored_values(snapshot, average, begin + box.offsets[0] * row, box.numel)
            found.append(_with(shard, torch.from_numpy(values)))
        if not shard.boxes:
            found.append(shard)
        begin += numel
    return tuple(found)


def _rounded(shards: ShardLayout, dtype: torch.dtype) -> ShardLayout:
    return tuple(_with(shard, shard.local.to(dtype)) for shard in shards)


def _with(shard: ParamShard, local: Tensor) -> ParamShard:
    return replace(shard, local=local, current=partial(_same, local))


def _same(local: Tensor) -> Tensor:
    return local


def whole_average(made: Made, walks: Walks, snapshot: int, average: int) -> Sequence[Tensor]:
    """All tensors of a stored average, float32, in the model's order; for ways that keep files of their own."""
    found, begin = [], 0
    for parameter in made.parameters:
        numel = math.prod(parameter.shape)
        values = walks.stored_values(snapshot, average, begin, numel)
        found.append(torch.from_numpy(values).view(parameter.shape))
        begin += numel
    return found
