"""DeepSpeed engines on gloo ranks: the configurations that are tested, and whole weights read off an engine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Awkward, inputs
from torch import Tensor, nn

LR = 0.02


class Model(Awkward):
    """The awkward shapes, with what does not train: a frozen vector, a parameter in no group, a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Linear(3, 5)  # five matrices and five vectors: four ranks that take turns take them out of order
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 30), requires_grad=False)
        self.loose = nn.Parameter(torch.linspace(-1.0, 1.0, 15).view(3, 5))
        self.register_buffer("seen", torch.arange(4.0) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.gain(x[:, :3])) * self.scale + self.seen.sum().to(x.dtype) + self.loose.sum()


@dataclass(frozen=True)
class Recipe:
    """How an engine is configured, and what it must turn out to be.

    Attributes:
        keeper: Class of the optimizer that DeepSpeed makes.
        zero: More of its section ``zero_optimization``.
        config: More of its config.
        adam: The optimizer: "torch", "fused" (DeepSpeed's FusedAdam) or "cpu" (its DeepSpeedCPUAdam).
        decay: Weight decay of matrices.
    """

    stage: int
    keeper: str
    dtype: torch.dtype = torch.float32
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adam: str = "torch"
    decay: float = 0.1


def make_model() -> Model:
    """The same weights at every call."""
    torch.manual_seed(7)
    return Model()


def whole_tensors(recipe: Recipe) -> dict[str, Tensor]:
    """What the layout of a fresh engine must hold: masters of what trains, the rest as the module keeps it."""
    model = make_model()
    found = {name: param.detach().to(recipe.dtype) for name, param in model.named_parameters()}
    found |= {name: found[name].float() for name in found if name not in ("scale", "loose")}
    return found | dict(model.named_buffers())  # DeepSpeed leaves buffers in the dtype that they have


def groups_of(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Two groups, of matrices and of vectors; ``loose`` is in none."""
    params = [param for name, param in model.named_parameters() if name != "loose"]
    dims = {id(param): len(getattr(param, "ds_shape", param.shape)) for param in params}
    decayed = [param for param in params if dims[id(param)] > 1]
    vectors = [param for param in params if dims[id(param)] <= 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _adam(groups: list[dict[str, Any]], kind: str) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return {"torch": torch.optim.AdamW, "fused": FusedAdam, "cpu": DeepSpeedCPUAdam}[kind](groups, lr=LR)


@contextmanager
def started() -> Iterator[None]:
    """DeepSpeed's own set-up, which says a lot, as a launcher prepares it."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def engine_of(recipe: Recipe, model: nn.Module | None = None) -> Iterator[Any]:
    """An engine around the model, destroyed afterwards, so that the ranks can make another."""
    import deepspeed

    model = make_model() if model is None else model
    stage3 = {"stage3_param_persistence_threshold": 0} if recipe.stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 0.0,  # 1.0 unless it is said
        "zero_optimization": {"stage": recipe.stage} | stage3 | recipe.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.dtype == torch.bfloat16},
    }
    optimizer = _adam(groups_of(model, recipe.decay), recipe.adam)
    with started():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config | recipe.config, dist_init_required=False
        )
        try:
            assert type(engine.optimizer).__name__ == recipe.keeper
            yield engine
        finally:
            engine.destroy()


def check_configured(engine: Any, recipe: Recipe) -> None:
    """After a forward: what the recipe asks for is really on, so that its test tests it."""
    zero, asked = engine.optimizer, recipe.zero
    if asked.get("round_robin_gradients"):
        assert any(
            [*map(id, zero.bit16_groups[i])] != [*map(id, group)]
            for i, group in enumerate(zero.round_robin_bit16_groups)
        )
    if recipe.stage == 3:
        few = asked.get("stage3_param_persistence_threshold", 0)
        assert [p.ds_numel <= few for p in engine.module.parameters()].count(True) == len(zero.persistent_parameters)
        assert bool(few) == any(p.data.numel() for p in engine.module.parameters())
        nearby = any(p.ds_secondary_tensor is not None for p in engine.module.parameters())
        assert nearby == ("zero_hpz_partition_size" in asked)
        assert (len(zero.fp16_groups) > 2) == ("sub_group_size" in asked)
    if "offload_optimizer" in asked:
        assert zero.cpu_offload if recipe.stage < 3 else zero.offload_optimizer and zero.offload_param


def train_step(engine: Any, dtype: torch.dtype) -> None:
    """One optimizer step, on a batch that tells by its number how many were made."""
    loss = engine(inputs(engine.global_steps, dtype)).float().square().mean()
    engine.backward(loss)
    engine.step()


def module_weights(engine: Any) -> dict[str, Tensor]:
    """The whole weights that the next forward uses, read without the masters."""
    import deepspeed

    found = {}
    for name, param in engine.module.named_parameters():
        # Stage 3 gathers a parameter on entering and frees it on leaving; the others are whole anyway.
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            found[name] = param.detach().clone()
    return found


class Wrapper:
    """What the callbacks of the Hugging Face Trainer get for an optimizer: accelerate's wrapper around DeepSpeed's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Names of the functions of torch.distributed and deepspeed.comm that are called and communicate."""
    from deepspeed import comm

    called: list[str] = []
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        for module in (dist, dist.distributed_c10d, comm, comm.comm):
            for name in dir(module):
                if name.startswith(
                    ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "isend")
                ):
                    found = getattr(module, name)
                    if callable(found) and not isinstance(found, type):
                        patched.setattr(module, name, _noting(found, name, called))
        yield called


def _noting(function: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return function(*args, **kwargs)

    return noted
