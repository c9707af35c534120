"""Parameters that are DTensors, as `torch.distributed.fsdp.fully_shard` makes them (one or more mesh axes)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from sharded_phema.backends.contract import Backend
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import Box, ParamShard, ShardLayout, canonical_name, whole
from sharded_phema.world import rank_and_size

__all__ = ["BACKEND", "box_on_mesh"]


def _knows(model: object) -> bool:
    if not isinstance(model, nn.Module):
        return False
    units = any(isinstance(module, FSDPModule) for module in model.modules())
    return units or any(isinstance(param, DTensor) for param in model.parameters())


def shard_layout(model: nn.Module) -> ShardLayout:
    """Every parameter's local shard; a parameter that is no DTensor is held whole by every rank.

    Raises:
        UnsupportedModel: A placement other than Shard and Replicate, or a mesh that leaves ranks out.
    """
    # After a forward without backward, FSDP leaves the root's parameters unsharded, and
    # named_parameters() then shows the temporary full weights instead of the shards.
    publish(model)
    return tuple(_piece(model, name, param) for name, param in model.named_parameters())


def publish(model: nn.Module) -> None:
    """Drop gathered weights, so that the next forward gathers the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _piece(model: nn.Module, path: str, param: nn.Parameter) -> ParamShard:
    def current() -> Tensor:
        found = model.get_parameter(path)
        # While FSDP has a unit gathered, the module shows a temporary; the shard is the parameter seen first.
        shard = param if isinstance(param, DTensor) and not isinstance(found, DTensor) else found
        return shard.to_local().detach() if isinstance(shard, DTensor) else shard.detach()

    name, shape, local, rank = canonical_name(path), tuple(param.shape), current(), rank_and_size()[0]
    if not isinstance(param, DTensor):
        return ParamShard(name, shape, (whole(shape),), local, rank, current)
    box, replica = _place(name, param)
    if box.sizes != tuple(local.shape) and local.numel():
        raise UnsupportedModel(
            f"{name}: placements {param.placements} mean a shard of {box.sizes}, the model holds {tuple(local.shape)}",
            hint="shard the parameter with torch's own fully_shard or distribute_tensor",
        )
    return ParamShard(name, shape, (box,) if box.numel or not param.numel() else (), local, replica, current)


def _place(name: str, param: DTensor) -> tuple[Box, int]:
    mesh, placements = param.device_mesh, param.placements
    # isinstance is not enough: torch's strided shards have offsets of their own.
    if strange := [p for p in placements if type(p) not in (Shard, Replicate)]:
        raise UnsupportedModel(
            f"{name}: placement {strange[0]} on mesh {mesh} cannot be mapped; expected Shard or Replicate",
            hint="tensor parallelism combined with FSDP is not supported yet; shard on one axis, or use HSDP",
        )
    size = rank_and_size()[1]
    if mesh.size() != size:
        raise UnsupportedModel(
            f"{name}: its mesh {mesh} has {mesh.size()} ranks, the world has {size}; who writes it is unknown",
            hint="give fully_shard a mesh that covers every rank",
        )
    axes = tuple(p.dim if isinstance(p, Shard) else None for p in placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a mesh of the world's size holds every rank"
    return box_on_mesh(tuple(param.shape), axes, tuple(mesh.shape), tuple(coordinate))


def box_on_mesh(
    shape: tuple[int, ...], axes: tuple[int | None, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[Box, int]:
    """The box that a DTensor keeps at one place of its mesh, and its position among equal boxes.

    Each mesh axis in turn cuts its dimension into pieces of ``ceil(length / ranks)``, so
    that the last pieces may be short or empty.

    Args:
        shape: Global shape.
        axes: For each mesh axis the tensor dimension that it shards, or None where it replicates.
        mesh: Ranks along each mesh axis.
        coordinate: Place on the mesh.

    Returns:
        The box, and the replica number: 0 at the origin of all replicating axes.
    """
    offsets, sizes, replica = [0] * len(shape), list(shape), 0
    for dim, ranks, place in zip(axes, mesh, coordinate, strict=True):
        if dim is None:
            replica = replica * ranks + place
            continue
        step = -(-sizes[dim] // ranks)
        begin = min(place * step, sizes[dim])
        offsets[dim] += begin
        sizes[dim] = min(step, sizes[dim] - begin)
    return Box(tuple(offsets), tuple(sizes)), replica


BACKEND = Backend("fsdp2", _knows, shard_layout, publish)
