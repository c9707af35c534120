"""Lightning: a small GPT learns the sources of Python's standard library; averages are chosen when it is trained.

python examples/train_lightning.py --out runs/lightning
torchrun --standalone --nproc-per-node 2 examples/train_lightning.py --out runs/lightning --strategy fsdp2
python examples/train_lightning.py --out runs/lightning --resume runs/lightning/last.ckpt --steps 2000
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from sharded_phema.integrations.lightning import PostHocEMACallback
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from gpt import GPT
from text import TextDataset

AVERAGE = "0.10"
"""Validated with, and among what is exported."""
SPLITS = ("train", "eval")


class LanguageModel(pl.LightningModule):
    """GPT with its losses and optimizer; ``shard`` cuts it up for FSDP2."""

    def __init__(self, width: int, layers: int, length: int, *, shard: bool) -> None:
        super().__init__()
        self.gpt, self.shard = GPT(width=width, layers=layers, length=length), shard

    def configure_model(self) -> None:
        if self.shard:
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in self.parameters())
            self.shard = False  # Lightning calls this again for each of its functions

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.gpt(batch["input_ids"], batch["labels"])[1]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("loss_of_average", self.gpt(batch["input_ids"], batch["labels"])[1], sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="folder of the run")
    parser.add_argument("--strategy", default="auto", help="auto, ddp, fsdp2, fsdp, deepspeed_stage_2, ...")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width of the GPT (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="its blocks (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, help="windows of 128 bytes on each rank (default: %(default)s)"
    )
    parser.add_argument("--resume", help="checkpoint to go on from")
    return parser.parse_args()


def trainer_of(options: argparse.Namespace, callbacks: list[pl.Callback]) -> pl.Trainer:
    """One rank, or those that torchrun started."""
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return pl.Trainer(
        strategy=ModelParallelStrategy(ranks, 1) if options.strategy == "fsdp2" else options.strategy,
        devices=here,
        num_nodes=ranks // here,
        max_steps=options.steps,
        val_check_interval=max(1, options.steps // 4),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=options.out,
        callbacks=callbacks,
    )


def main() -> None:
    options = parse_options()
    ema = PostHocEMACallback(
        options.out / "ema",
        snapshot_every=max(1, options.steps // 20),
        evaluate_with=AVERAGE,
        export=(AVERAGE, "0.15", "decay:linear:0.2"),
    )
    saving = ModelCheckpoint(options.out, "last", every_n_train_steps=max(1, options.steps // 4))
    trainer = trainer_of(options, [ema, saving])
    torch.manual_seed(0)
    model = LanguageModel(options.width, options.layers, 128, shard=options.strategy == "fsdp2")
    train, held_out = (DataLoader(TextDataset(split, 128), options.batch, split == "train") for split in SPLITS)
    trainer.fit(model, train, held_out, ckpt_path=options.resume)
    if trainer.is_global_zero:
        print(f"loss of the average {AVERAGE}: {float(trainer.callback_metrics['loss_of_average']):.4f}")
        whole = LanguageModel(options.width, options.layers, 128, shard=False)
        for folder in sorted((options.out / "ema-exports").iterdir()):
            whole.load_state_dict(load_file(folder / "model.safetensors"))
            print(f"{folder} opens in the module")


if __name__ == "__main__":
    main()
