"""Modules that nobody shards: every process holds every parameter, and the first of them writes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from sharded_phema.backends.contract import Backend
from sharded_phema.layout import ParamShard, ShardLayout, canonical_name, whole
from sharded_phema.world import rank_and_size

__all__ = ["BACKEND"]


def _knows(model: object) -> bool:
    return isinstance(model, nn.Module) and not any(map(_shards, model.modules())) and not _partitioned(model)


def _shards(module: nn.Module) -> bool:
    # A DeepSpeed engine is told by its name, because DeepSpeed may not be installed.
    return isinstance(module, FullyShardedDataParallel) or type(module).__name__.startswith("DeepSpeed")


def _partitioned(model: nn.Module) -> bool:
    return any(hasattr(param, "ds_id") for param in model.parameters())


def shard_layout(model: nn.Module) -> ShardLayout:
    """Every parameter whole, as this process's only box.

    Args:
        model: A module, or one inside DistributedDataParallel.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return tuple(_piece(inner, name) for name, _ in inner.named_parameters())


def _piece(model: nn.Module, name: str) -> ParamShard:
    def current() -> Tensor:
        # Asked of the module each time, so that a parameter put in the place of another is noticed.
        return model.get_parameter(name).detach()

    local = current()
    shape = tuple(local.shape)
    return ParamShard(canonical_name(name), shape, (whole(shape),), local, rank_and_size()[0], current)


def _nothing_to_publish(model: nn.Module) -> None:
    """The parameters are the weights that forward reads."""


BACKEND = Backend("plain", _knows, shard_layout, _nothing_to_publish)
