"""Every way in which a model is sharded: one small model in each, trained alike, and what a rank has of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from builders import lay
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sharded_phema.layout import ShardLayout

Piece = tuple[str, str, tuple[int, ...], tuple, Tensor]
"""Label, name, global shape, boxes and values of a piece of an average."""


class Block(nn.Module):
    """A normalisation, two matrices that tensor parallelism can cut, a head of an odd number of rows, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.0, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x))))) * self.scale


def make_block() -> Block:
    """The same weights at every call."""
    torch.manual_seed(3)
    return Block()


def batch(step: int) -> Tensor:
    """The same on every rank, so that averaging gradients over the ranks changes little or nothing."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + step))


@dataclass(frozen=True)
class Sharded:
    """A sharded model as a test drives it.

    Attributes:
        model: What PostHocEMA is given.
        optimizer: The same, where it needs one.
        step: Makes the optimizer step of a number.
        forward: Computes with the model as it stands; the result is the same on every rank.
    """

    model: Any
    optimizer: Any
    step: Callable[[int], object]
    forward: Callable[[Tensor], Tensor]


def _torch(model: nn.Module) -> Sharded:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    def step(number: int) -> None:
        model(batch(number)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Sharded(model, None, step, lambda x: model(x).float())


def _fsdp2(mesh: tuple[int, ...] = (), **options: Any) -> Sharded:
    if mesh:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    model = make_block()
    fully_shard(model.up, **options)
    fully_shard(model, **options)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return _torch(model)


def _tensor_parallel(data: int) -> Sharded:
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("data", "tensor"))
    model = make_block()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
        assert model.up.weight.device_mesh.ndim == 2 and model.norm.weight.device_mesh.ndim == 1
    assert isinstance(model.up.weight, DTensor)
    return _torch(model)


def _fsdp1(strategy: str, *, original: bool = True) -> Sharded:
    options: dict[str, Any] = {}
    if "HYBRID" in strategy:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = FullyShardedDataParallel(
        make_block(),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        **options,
    )
    return _torch(model)


@contextmanager
def _zero(stage: int, dtype: torch.dtype, **zero: Any) -> Iterator[Sharded]:
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    model = make_block()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    def step(number: int) -> None:
        engine.backward(engine(batch(number).to(dtype)).float().square().mean())
        engine.step()

    try:
        yield Sharded(engine, None, step, lambda x: engine(x.to(dtype)).float())
    finally:
        engine.destroy()


@contextmanager
def _plainly(make: Callable[[], Sharded]) -> Iterator[Sharded]:
    yield make()


@dataclass(frozen=True)
class Kind:
    """One way of sharding.

    Attributes:
        ranks: How many processes it is tried on.
        row: The row of README's table that it stands for.
        make: The model, on each rank.
        tolerance: Rounding of the forward, relative, that another order of sums or a lower precision brings.
    """

    ranks: int
    row: str
    make: Callable[[], Any]
    tolerance: float = 1e-5


LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FSDP1, TP = "FSDP1 `FullyShardedDataParallel`", "tensor parallelism (DTensor), alone or with FSDP2"
KINDS = {
    "plain": Kind(1, "plain module", lambda: _plainly(lambda: _torch(make_block()))),
    "ddp": Kind(
        3,
        "DistributedDataParallel, or the same module on every rank",
        lambda: _plainly(lambda: _torch(nn.parallel.DistributedDataParallel(make_block()))),
    ),
    "fsdp2": Kind(3, "FSDP2 `fully_shard`", lambda: _plainly(_fsdp2)),
    "fsdp2-bf16": Kind(2, "FSDP2 `fully_shard`", lambda: _plainly(lambda: _fsdp2(mp_policy=LOW)), 0.02),
    "hsdp": Kind(4, "FSDP2 on two mesh axes (HSDP)", lambda: _plainly(lambda: _fsdp2((2, 2)))),
    "tp": Kind(2, TP, lambda: _plainly(lambda: _tensor_parallel(1))),
    "fsdp2+tp": Kind(4, TP, lambda: _plainly(lambda: _tensor_parallel(2))),
    "fsdp1": Kind(2, FSDP1, lambda: _plainly(lambda: _fsdp1("FULL_SHARD"))),
    "fsdp1-flat": Kind(3, FSDP1, lambda: _plainly(lambda: _fsdp1("SHARD_GRAD_OP", original=False))),
    "fsdp1-hybrid": Kind(4, FSDP1, lambda: _plainly(lambda: _fsdp1("HYBRID_SHARD"))),
    "zero0": Kind(2, "DeepSpeed ZeRO 0", lambda: _zero(0, torch.float32)),
    "zero1": Kind(2, "DeepSpeed ZeRO 1 and 2", lambda: _zero(1, torch.bfloat16), 0.02),
    "zero2": Kind(3, "DeepSpeed ZeRO 1 and 2", lambda: _zero(2, torch.float32)),
    "zero3": Kind(4, "DeepSpeed ZeRO 3", lambda: _zero(3, torch.float32)),
    "zero3-bf16": Kind(2, "DeepSpeed ZeRO 3", lambda: _zero(3, torch.bfloat16), 0.02),
}


def pieces(averages: dict[str, ShardLayout]) -> list[Piece]:
    """Copies of what this rank writes of each average."""
    return [
        (label, shard.name, shard.global_shape, shard.boxes, shard.local.detach().clone())
        for label, layout in averages.items()
        for shard in layout
        if shard.replica == 0
    ]


def assembled(ranks: list[list[Piece]]) -> dict[str, dict[str, Tensor]]:
    """Whole averages from the pieces of all ranks, every element of which must be there once."""
    whole: dict[str, dict[str, Tensor]] = {}
    for label, name, shape, boxes, values in (piece for rank in ranks for piece in rank):
        target = whole.setdefault(label, {}).setdefault(name, torch.full(shape, torch.nan))
        assert all(target[box.slices].isnan().all() for box in boxes)
        lay(target, boxes, values)
    assert not any(value.isnan().any() for average in whole.values() for value in average.values())
    return whole
