"""Trains the digits model sharded over the ranks of torchrun and records its averages' snapshots.

torchrun --standalone --nproc-per-node 2 examples/digits/train.py --out runs/demo
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sharded_phema import PostHocEMA
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data import Digits, load_split
from diffusion import denoising_loss, training_sigmas
from model import Denoiser, ModelConfig
from progress import progress
from ranks import process_group

SNAPSHOTS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """One run.

    Attributes:
        out: Folder of the run; must not hold an earlier one.
        steps: Optimizer steps.
        batch: Digits of each step on each rank.
        learning_rate: Constant over the run: the averages take the place of a decay.
        model: Shapes of the network.
    """

    out: Path
    steps: int
    batch: int
    learning_rate: float
    model: ModelConfig


def parse_options() -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 1000, tiny: 40)")
    parser.add_argument("--batch", type=int, default=32, help="digits a step on each rank (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="constant rate (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a much smaller network for a few seconds: a test")
    given = parser.parse_args()
    model = ModelConfig(width=32, depth=1) if given.tiny else ModelConfig()
    steps = given.steps or (40 if given.tiny else 1000)
    if (given.out / "ema").exists():
        parser.error(f"{given.out} holds an earlier run: remove it or name another folder with --out")
    return Options(given.out, steps, given.batch, given.learning_rate, model)


def build_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The network, each block and then the rest sharded over all ranks."""
    torch.manual_seed(0)
    model = Denoiser(config).to(device)
    for block in model.network.blocks:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "FSDP2 did not shard the model"
    return model


def batch_loss(model: nn.Module, digits: Digits, batch: int, generator: torch.Generator) -> Tensor:
    """Mean denoising loss of a random batch."""
    device = digits.images.device
    chosen = torch.randint(len(digits.labels), (batch,), generator=generator, device=device)
    images, labels = digits.images[chosen], digits.labels[chosen]
    sigma = training_sigmas(torch.randn(batch, generator=generator, device=device))
    noise = torch.randn(images.shape, generator=generator, device=device)
    return denoising_loss(model, images, labels, sigma, noise).mean()


def train(options: Options, model: nn.Module, digits: Digits, seed: int) -> list[tuple[int, float]]:
    """Runs every step; returns the mean loss over all ranks of each 1 % of the run."""
    generator = torch.Generator(digits.images.device).manual_seed(seed)
    # Unfused, Adam spends more time handling its many small DTensors than computing.
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), fused=True)
    steps, window = options.steps, max(1, options.steps // 100)
    ema = PostHocEMA(
        model, options.out / "ema", sigma_rels=(0.05, 0.10), snapshot_every=max(1, steps // SNAPSHOTS), unit="steps"
    )
    # Two more widths, followed all the way: the truth that report.py holds the rebuilt averages against.
    truth = PostHocEMA(model, options.out / "truth", sigma_rels=(0.15, 0.20), snapshot_every=steps, unit="steps")
    curve, total = [], torch.zeros((), device=digits.images.device)
    for step in progress(range(1, steps + 1), "training"):
        loss = batch_loss(model, digits, options.batch, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        truth.update(step)
        total += loss.detach() / window
        if step % window == 0:
            dist.all_reduce(total)
            curve.append((step, total.item() / dist.get_world_size()))
            total.zero_()
    ema.close()
    truth.close()
    return curve


def write_raw(model: nn.Module, folder: Path) -> None:
    """Writes the final weights without any averaging; a network this small may be gathered whole."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


def main() -> None:
    """Trains and writes ``ema/``, ``truth/``, ``raw/`` and ``train.json``."""
    options = parse_options()
    with process_group() as device:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        model = build_model(options.model, device)
        started = time.perf_counter()
        curve = train(options, model, load_split().train.shard(rank, world_size).to(device), seed=1 + rank)
        seconds = time.perf_counter() - started
        write_raw(model, options.out / "raw")
        if rank == 0:
            record = asdict(options) | {"out": str(options.out), "ranks": world_size, "seconds": seconds, "loss": curve}
            (options.out / "train.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
