"""DeepSpeed: the float32 masters that a ZeRO optimizer, or one of its mixed precision optimizers, keeps on this rank.

A model comes as its engine, or as the module with the engine's optimizer beside it. DeepSpeed itself is never
imported: its objects are told by the names of their classes, and what is read of them, most of it private, stands
in ``masters`` and ``parts``. Tested with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharded_phema.backends.contract import Backend, held_whole, kind_of, persistent_buffers
from sharded_phema.backends.zero.masters import Held, as_it_is, shape_of, weights_of
from sharded_phema.backends.zero.parts import known, parts_of, steps_of
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import ParamShard, ShardLayout, boxes_of_flat_range, canonical_name

__all__ = ["BACKEND"]


def shard_layout(model: nn.Module, optimizer: object) -> ShardLayout:
    """Every trained parameter's master as far as this rank keeps it; what does not train as the module holds it.

    Args:
        model: An engine, or the module inside it.
        optimizer: Beside a module the engine's optimizer, or a wrapper that has it as ``optimizer``.

    Raises:
        UnsupportedModel: There is no optimizer, or it keeps masters in a way that cannot be mapped.
    """
    module, keeper, zero = parts_of(model, optimizer)
    masters = {id(param): held for param, held in keeper.masters(zero)}
    named = list(module.named_parameters())
    if not any(id(param) in masters for _, param in named):
        raise UnsupportedModel(
            f"the {type(zero).__name__} trains none of the {len(named)} parameters of {type(module).__qualname__}",
            hint="give the module that deepspeed.initialize was called with, and the optimizer that it returned",
        )
    params = [_piece(path, param, masters.get(id(param))) for path, param in named]
    return (*params, *(_buffer(module, path) for path, _ in persistent_buffers(module)))


@torch.no_grad()
def publish(model: nn.Module, optimizer: object) -> None:
    """Round the masters into the module's weights and gather them, as the optimizer's step does. Collective."""
    module, keeper, zero = parts_of(model, optimizer)
    keeper.publish(zero, module)


def _piece(path: str, param: Any, master: Held | None) -> ParamShard:
    # Without a master nothing trains it, whatever requires_grad says: no optimizer group has it.
    held, kind = (as_it_is(param), "frozen") if master is None else (master, kind_of(param))
    name, shape, local = canonical_name(path), shape_of(param), held.current()
    _check_rounded(name, param, held, local)
    boxes = boxes_of_flat_range(shape, held.start, held.stop)
    return ParamShard(name, shape, boxes, local, held.current, kind)  # type: ignore[arg-type]


def _check_rounded(name: str, param: Any, held: Held, local: Tensor) -> None:
    """Prove that the weights in use are the rounded master, so that publishing what is there changes nothing."""
    weights = weights_of(param, held)
    if weights.data_ptr() == local.data_ptr():
        return
    if not torch.equal(local.flatten().to(weights.dtype), weights.to(local.device)):
        raise UnsupportedModel(
            f"{name}: the weights in use are not those of the float32 master that the optimizer trains",
            hint="make PostHocEMA after the first optimizer step; where weights were put into the module after "
            "deepspeed.initialize, refresh_fp32_params() of the optimizer makes them its masters",
        )


def _buffer(module: nn.Module, path: str) -> ParamShard:
    return held_whole(path, "buffer", lambda: module.get_buffer(path).detach())


BACKEND = Backend("zero", known, shard_layout, publish, steps_of)
