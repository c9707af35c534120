"""accelerate on gloo ranks: an accelerator of each mode, on CPU, which really is what it claims."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fsdp1_models import wrap
from matrix import batch, make_block
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

ACCUMULATED = 2


@contextmanager
def accelerator_of(mode: str) -> Iterator[Any]:
    """A fresh accelerator for ``ddp``, ``fsdp1``, ``fsdp2``, ``zero2`` or ``zero3``, among ranks that run already."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"ACCELERATE_USE_DEEPSPEED": str(mode.startswith("zero")).lower()}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, environment), warnings.catch_warnings(), fsdp_on_cpu():
        warnings.simplefilter("ignore")
        try:
            yield Accelerator(gradient_accumulation_steps=ACCUMULATED, **_plugin(mode))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _plugin(mode: str) -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

    if mode.startswith("fsdp"):
        options: dict[str, Any] = {"fsdp_version": int(mode[-1]), "state_dict_type": "SHARDED_STATE_DICT"}
        options |= {"use_orig_params": True} if mode == "fsdp1" else {}
        return {"cpu": True, "fsdp_plugin": FullyShardedDataParallelPlugin(**options)}
    if mode.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": ACCUMULATED,
            "zero_optimization": {"stage": int(mode[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        # Not cpu=True, with which accelerate silently makes DistributedDataParallel of it.
        gloo = InitProcessGroupKwargs(backend="gloo")
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config), "kwargs_handlers": [gloo]}
    return {"cpu": True}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """On CPU accelerate silently makes DistributedDataParallel of FSDP: tests have it keep to what was asked."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        # Whoever asks for the state calls this again, without the plugin.
        plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    with mock.patch.object(AcceleratorState, "__init__", patched):
        yield


class Loop:
    """A prepared model and its micro-batches, which are the same on every rank."""

    def __init__(self, accelerator: Any, mode: str, lr: float = 0.02) -> None:
        # By hand, which accelerate allows: its own wrapping asks for an accelerator.
        model = wrap(make_block()) if mode == "fsdp1" else make_block()
        # Adam's state, as accelerate restores it under FSDP1, has the sizes of another rank's shards (1.15, on CPU).
        kind = torch.optim.SGD if mode == "fsdp1" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=lr)
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        assert_mode(self.model, mode)

    def micro_batch(self, number: int) -> None:
        """What a script does with one, but for the averages."""
        with self.accelerator.accumulate(self.model):
            loss = self.model(batch(number)).float().square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()


def assert_mode(model: Any, mode: str) -> None:
    """The prepared model is what it claims to be."""
    if mode == "ddp":
        assert isinstance(model, nn.parallel.DistributedDataParallel)
    elif mode == "fsdp1":
        assert isinstance(model, FullyShardedDataParallel)
    elif mode == "fsdp2":
        assert all(isinstance(param, DTensor) for param in model.parameters())
    else:
        assert model.zero_optimization_stage() == int(mode[-1])
