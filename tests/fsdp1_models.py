"""Models inside FullyShardedDataParallel: every strategy, and the oddities that it allows."""

import math
from typing import Any

import torch
from models import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from sharded_phema.layout import ShardLayout, canonical_name

SHARDED = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
LOW = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16)


def wrap(model: nn.Module, strategy: str = "FULL_SHARD", *, original: bool = True, **options: Any) -> nn.Module:
    """FSDP1 around a model.

    Args:
        model: What to wrap, in place.
        strategy: Name of the sharding strategy; hybrid ones cut among two ranks.
        original: Whether the original parameters stay (``use_orig_params``).
        options: More arguments of FullyShardedDataParallel.
    """
    if "HYBRID" in strategy:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),  # without it FSDP1 asks for an accelerator
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        **options,
    )


def awkward(strategy: str = "FULL_SHARD", *, original: bool = True, low: bool = False, **options: Any) -> nn.Module:
    """The model of the other sharded tests, its convolution in a unit of its own; ``low`` computes in bfloat16."""
    options = {"auto_wrap_policy": ModuleWrapPolicy({nn.Conv1d}), **options}
    return wrap(make_model(), strategy, original=original, **({"mixed_precision": LOW} if low else {}), **options)


def assert_sharded(model: nn.Module, layout: ShardLayout, strategy: str = "FULL_SHARD") -> None:
    """The model is really FSDP1's, and no rank holds all of what FSDP shards."""
    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    assert units and all(unit._handle.flat_param._is_flat_param for unit in units)
    held, total = sum(s.local.numel() for s in layout), sum(math.prod(s.global_shape) for s in layout)
    assert held < total if strategy in SHARDED else held == total


def summoned(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, as FSDP1 itself gathers them."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {canonical_name(name): param.detach().clone() for name, param in model.named_parameters()}


class Odd(nn.Module):
    """An empty parameter, a scalar, buffers of both kinds, an ignored layer, a frozen one, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(5))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first = nn.Linear(5, 5)
        self.norm = nn.GroupNorm(1, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.ignored = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.register_buffer("gain", torch.rand(5))
        self.register_buffer("passing", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.norm(self.first(x + self.shift))) * self.gain * self.passing
        return self.again(torch.tanh(self.ignored(hidden))) * self.scale + self.empty.sum()


def make_odd() -> Odd:
    """The same weights at every call."""
    torch.manual_seed(11)
    return Odd()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Clones of parameters and buffers of a plain model that a state dict would hold, tied ones once, in order."""
    stored = model.state_dict()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named if name in stored}
