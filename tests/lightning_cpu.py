"""Lightning on gloo ranks: a module, quiet trainers, and the strategies that insist on CUDA made to run on the CPU."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from models import Awkward, inputs, shard
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

LR = 0.02
BATCHES = 8
"""Of an epoch."""


class Module(pl.LightningModule):
    """The awkward shapes. ``fully`` shards them as the strategy for FSDP2 wants it; ``failing`` fails in validation."""

    def __init__(self, *, fully: bool = False, failing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net, self.fully, self.failing = Awkward(), fully, failing

    def configure_model(self) -> None:
        if self.fully:
            self.fully = False
            shard(self.net)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", loss_of(self.net, batch))
        if self.failing and not self.trainer.sanity_checking:
            raise ArithmeticError("validation fails")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LR)


class CpuFSDP(FSDPStrategy):
    """Names the device as torch wants it on a CPU, where Lightning gives its number, which is that of a GPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


class CpuDeepSpeed(DeepSpeedStrategy):
    """Leaves out the check for CUDA, and gives the CPU the number that DeepSpeed asks for."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning.pytorch.strategies.deepspeed._validate_device_index_selection", lambda gpus: None)
            super(DeepSpeedStrategy, self).setup_environment()


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    """Of a batch."""
    return net(batch).square().mean()


def batches() -> DataLoader[Tensor]:
    """An epoch, the same on every rank, so that averaging gradients over two ranks is exact."""
    return DataLoader([inputs(step) for step in range(1, BATCHES + 1)], batch_size=None)  # type: ignore[arg-type]


def strategy_of(kind: str) -> Any:
    """A strategy by its short name."""
    if kind.startswith("zero"):
        zero = {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}
        config = {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 6,
            "gradient_clipping": 0.0,  # 1.0 unless it is said
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        return CpuDeepSpeed(config=config, process_group_backend="gloo")
    make = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        # Whole states of FSDP1 read freed memory on the CPU, with or without a callback.
        "fsdp1": lambda: CpuFSDP(state_dict_type="sharded", process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    }
    return make[kind]()


def launched() -> None:
    """What torchrun tells a rank, and quiet: the process group of these ranks exists already."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": socket.gethostname()})
    os.environ.setdefault("MASTER_PORT", "1")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trainer_of(kind: str, root: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A trainer without bars, logs, and all that takes time, two batches to a step of the optimizer."""
    size = 1 if kind == "single" else dist.get_world_size()
    environment = [] if kind == "single" else [TorchElasticEnvironment()]
    chosen: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
        "limit_val_batches": 1,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        "plugins": environment,
        "logger": False,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy_of(kind),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        callbacks=callbacks,
        **chosen | options,
    )
