"""Parameters that are DTensors: fully_shard on one mesh axis or more, tensor parallelism, or both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from sharded_phema.backends.contract import Backend, held_whole, kind_of, persistent_buffers
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import Box, ParamShard, ShardLayout, TensorKind, canonical_name, cut, whole

__all__ = ["BACKEND", "Runs", "Split", "boxes_of", "runs_on_mesh"]

Runs = tuple[Box, ...]
"""What is kept of one dimension: runs of indices in increasing order, no two of them adjacent, as 1-d boxes."""


@dataclass(frozen=True, slots=True)
class Split:
    """What one mesh axis does to a tensor.

    Attributes:
        ranks: Ranks along the axis.
        dim: The dimension that it splits over them, or None where it replicates.
        first: Into how many pieces the dimension is cut beforehand, each of which is then split over the ranks.
    """

    ranks: int
    dim: int | None
    first: int = 1


def _knows(model: object, optimizer: object) -> bool:
    if not isinstance(model, nn.Module):
        return False
    units = any(isinstance(module, FSDPModule) for module in model.modules())
    return units or any(isinstance(tensor, DTensor) for tensor in (*model.parameters(), *model.buffers()))


def shard_layout(model: nn.Module, optimizer: object) -> ShardLayout:
    """Every tensor's local shard; one that is no DTensor is held whole by every rank.

    Raises:
        UnsupportedModel: A placement that is neither a shard nor a replica, or a shard that is no row of boxes.
    """
    # After a forward without backward, FSDP leaves the root's parameters unsharded, and
    # named_parameters() then shows the temporary full weights instead of the shards.
    publish(model, optimizer)
    params = [_piece(model, path, param, kind_of(param)) for path, param in model.named_parameters()]
    return (*params, *(_piece(model, path, buffer, "buffer") for path, buffer in persistent_buffers(model)))


def publish(model: nn.Module, optimizer: object) -> None:
    """Drop gathered weights, so that the next forward gathers the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _piece(model: nn.Module, path: str, tensor: Tensor, kind: TensorKind) -> ParamShard:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)

    def current() -> Tensor:
        found = getattr(module, name)
        # While FSDP has a unit gathered, the module shows a temporary; the shard is the parameter seen first.
        shard = tensor if isinstance(tensor, DTensor) and not _placed_alike(tensor, found) else found
        return shard.to_local().detach() if isinstance(shard, DTensor) else shard.detach()

    if not isinstance(tensor, DTensor):
        return held_whole(path, kind, current)
    name_, local = canonical_name(path), current()
    return ParamShard(name_, tuple(tensor.shape), _held(name_, tensor, local), local, current, kind)


def _placed_alike(tensor: DTensor, found: object) -> bool:
    # With tensor parallelism a gathered parameter is a DTensor too, on the mesh of that alone.
    return isinstance(found, DTensor) and (found.device_mesh, found.placements) == (
        tensor.device_mesh,
        tensor.placements,
    )


def _held(name: str, tensor: DTensor, local: Tensor) -> tuple[Box, ...]:
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    splits = [_split(name, tensor, axis) for axis in range(mesh.ndim)]
    if not tensor.numel():
        return (whole(tensor.shape),)
    if coordinate is None:  # this rank is no part of the tensor's mesh
        return ()
    runs = runs_on_mesh(tuple(tensor.shape), splits, coordinate)
    sizes = tuple(sum(run.numel for run in dim) for dim in runs)
    if sizes != tuple(local.shape) and (local.numel() or all(sizes)):
        raise UnsupportedModel(
            f"{name}: placements {tensor.placements} on mesh {tuple(mesh.shape)} mean a shard of {sizes} at "
            f"{tuple(coordinate)}, the model holds {tuple(local.shape)}",
            hint="shard it with torch's own fully_shard or distribute_tensor, and into sizes that the ranks divide",
        )
    boxes = boxes_of(runs)
    if boxes is None:
        raise UnsupportedModel(
            f"{name}: placements {tensor.placements} on mesh {tuple(mesh.shape)} leave a rank alternating columns",
            hint="let the mesh axis of tensor parallelism come after that of fully_shard, which keeps shards in one "
            "run, or shard another dimension",
        )
    return boxes


def _split(name: str, tensor: DTensor, axis: int) -> Split:
    placement, ranks = tensor.placements[axis], tensor.device_mesh.size(axis)
    if type(placement) is Replicate:
        return Split(ranks, None)
    if type(placement) is Shard:
        return Split(ranks, placement.dim)
    if (strided := _strided(placement)) is not None:
        return Split(ranks, *strided)
    raise UnsupportedModel(
        f"{name}: placement {placement} on axis {axis} of mesh {tuple(tensor.device_mesh.shape)} cannot be mapped; "
        "expected Shard or Replicate",
        hint="redistribute the tensor to Shard or Replicate before PostHocEMA is made",
    )


def _strided(placement: Placement) -> tuple[int, int] | None:
    """Dimension and pieces of the placement that fully_shard gives to what tensor parallelism has cut already."""
    # Private; told by its name, so that a torch without it works. Tested with torch 2.13.
    if type(placement).__name__ != "_StridedShard":
        return None
    return int(placement.dim), int(placement.split_factor)  # type: ignore[attr-defined]


def runs_on_mesh(shape: Sequence[int], splits: Sequence[Split], coordinate: Sequence[int]) -> tuple[Runs, ...]:
    """The indices of each dimension that a DTensor keeps at one place of its mesh.

    Each mesh axis in turn splits what those before it left. Pieces have ``ceil(length / pieces)``
    indices, so that the last ones may be short or empty.

    Args:
        shape: Global shape.
        splits: What each mesh axis does.
        coordinate: Place on the mesh.
    """
    runs: list[Runs] = [(Box((0,), (length,)),) if length else () for length in shape]
    for split, place in zip(splits, coordinate, strict=True):
        if split.dim is not None:
            runs[split.dim] = _kept(runs[split.dim], split, place)
    return tuple(runs)


def _kept(runs: Runs, split: Split, place: int) -> Runs:
    """Piece ``place`` of each of the first pieces of what some runs hold end to end."""
    length, kept = sum(run.numel for run in runs), list[Box]()
    for index in range(split.first):
        piece = _chunk(0, length, split.first, index)
        for run in cut(runs, *_chunk(*piece, split.ranks, place)):
            if kept and kept[-1].offsets[0] + kept[-1].numel == run.offsets[0]:
                run = Box(kept[-1].offsets, (kept.pop().numel + run.numel,))
            kept.append(run)
    return tuple(kept)


def _chunk(start: int, stop: int, pieces: int, index: int) -> tuple[int, int]:
    step = -(-(stop - start) // pieces)
    begin = min(start + index * step, stop)
    return begin, min(begin + step, stop)


def boxes_of(runs: Sequence[Runs]) -> tuple[Box, ...] | None:
    """The boxes of a shard, or None where the shard's rows do not hold them one after another.

    Args:
        runs: Indices of each dimension.
    """
    if not all(runs):
        return ()
    for dim, here in enumerate(runs):
        # Within a single row the runs of the next dimension follow each other; several rows interleave them.
        if len(here) > 1 and any(run.numel > 1 for outer in runs[:dim] for run in outer):
            return None
    return tuple(
        Box(tuple(run.offsets[0] for run in place), tuple(run.sizes[0] for run in place))
        for place in itertools.product(*runs)
    )


BACKEND = Backend("fsdp2", _knows, shard_layout, publish)
