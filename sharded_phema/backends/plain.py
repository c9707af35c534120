"""Modules that nobody shards: every process holds every tensor, as DistributedDataParallel keeps them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_phema.backends.contract import Backend, held_whole, kind_of, persistent_buffers
from sharded_phema.layout import ParamShard, ShardLayout

__all__ = ["BACKEND"]


def _knows(model: object, optimizer: object) -> bool:
    return isinstance(model, nn.Module) and not any(map(_shards, model.modules()))


def _shards(module: nn.Module) -> bool:
    # A DeepSpeed engine is told by its name, because DeepSpeed may not be installed.
    return type(module).__name__.startswith("DeepSpeed")


def shard_layout(model: nn.Module, optimizer: object) -> ShardLayout:
    """Every tensor whole, as this process's only box.

    Args:
        model: A module, or one inside DistributedDataParallel or torch.compile.
        optimizer: Not asked.
    """
    inner = _unwrapped(model)
    params = [_piece(inner, path, param) for path, param in inner.named_parameters()]
    return (*params, *(_buffer(inner, path) for path, _ in persistent_buffers(inner)))


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _piece(model: nn.Module, path: str, param: nn.Parameter) -> ParamShard:
    # Asked of the module each time, so that a parameter put in the place of another is noticed.
    return held_whole(path, kind_of(param), lambda: model.get_parameter(path).detach())


def _buffer(model: nn.Module, path: str) -> ParamShard:
    def current() -> Tensor:
        return model.get_buffer(path).detach()

    return held_whole(path, "buffer", current)


def _nothing_to_publish(model: nn.Module, optimizer: object) -> None:
    """The parameters are the weights that forward reads."""


BACKEND = Backend("plain", _knows, shard_layout, _nothing_to_publish)
