"""Parameters that are DTensors, as `torch.distributed.fsdp.fully_shard` makes them (one or more mesh axes)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from sharded_phema.backends.contract import Backend, held_whole, kind_of, persistent_buffers
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import Box, ParamShard, ShardLayout, TensorKind, canonical_name

__all__ = ["BACKEND", "box_on_mesh"]


def _knows(model: object, optimizer: object) -> bool:
    if not isinstance(model, nn.Module):
        return False
    units = any(isinstance(module, FSDPModule) for module in model.modules())
    return units or any(isinstance(param, DTensor) for param in model.parameters())


def shard_layout(model: nn.Module, optimizer: object) -> ShardLayout:
    """Every tensor's local shard; one that is no DTensor is held whole by every rank.

    Raises:
        UnsupportedModel: A placement other than Shard and Replicate.
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
        shard = tensor if isinstance(tensor, DTensor) and not isinstance(found, DTensor) else found
        return shard.to_local().detach() if isinstance(shard, DTensor) else shard.detach()

    if not isinstance(tensor, DTensor):
        return held_whole(path, kind, current)
    name_, shape, local = canonical_name(path), tuple(tensor.shape), current()
    box = _place(name_, tensor)
    if box.sizes != tuple(local.shape) and local.numel():
        raise UnsupportedModel(
            f"{name_}: placements {tensor.placements} mean a shard of {box.sizes}, "
            f"the model holds {tuple(local.shape)}",
            hint="shard the parameter with torch's own fully_shard or distribute_tensor",
        )
    return ParamShard(name_, shape, (box,) if box.numel or not tensor.numel() else (), local, current, kind)


def _place(name: str, param: DTensor) -> Box:
    mesh, placements = param.device_mesh, param.placements
    # isinstance is not enough: torch's strided shards have offsets of their own.
    if strange := [p for p in placements if type(p) not in (Shard, Replicate)]:
        raise UnsupportedModel(
            f"{name}: placement {strange[0]} on mesh {mesh} cannot be mapped; expected Shard or Replicate",
            hint="tensor parallelism combined with FSDP is not supported yet; shard on one axis, or use HSDP",
        )
    axes = tuple(p.dim if isinstance(p, Shard) else None for p in placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a mesh of the world's size holds every rank"
    return box_on_mesh(tuple(param.shape), axes, tuple(mesh.shape), tuple(coordinate))


def box_on_mesh(
    shape: tuple[int, ...], axes: tuple[int | None, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...]
) -> Box:
    """The box that a DTensor keeps at one place of its mesh.

    Each mesh axis in turn cuts its dimension into pieces of ``ceil(length / ranks)``, so
    that the last pieces may be short or empty.

    Args:
        shape: Global shape.
        axes: For each mesh axis the tensor dimension that it shards, or None where it replicates.
        mesh: Ranks along each mesh axis.
        coordinate: Place on the mesh.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, ranks, place in zip(axes, mesh, coordinate, strict=True):
        if dim is None:
            continue
        step = -(-sizes[dim] // ranks)
        begin = min(place * step, sizes[dim])
        offsets[dim] += begin
        sizes[dim] = min(step, sizes[dim] - begin)
    return Box(tuple(offsets), tuple(sizes))


BACKEND = Backend("fsdp2", _knows, shard_layout, publish)
