"""accelerate: a small GPT on the sources of Python's standard library, with averages of its weights.

Start it with ``launch/accelerate_fsdp2.sh --out runs/fsdp2``, or one of its sisters, or, in one process, with
``python examples/train_accelerate.py --out runs/one``; again with ``--resume`` it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from sharded_phema.integrations.accelerate import AcceleratedEMA, prepare_ema

from gpt import GPT
from text import TextDataset, batches

ACCUMULATED = 2
"""Micro-batches of an optimizer step."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for averages and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps altogether")
    parser.add_argument("--snapshot-every", type=int, default=100, help="optimizer steps between snapshots")
    parser.add_argument("--batch", type=int, default=16, help="windows in a micro-batch of one process")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="bytes in a window")
    parser.add_argument("--windows", type=int, default=None, help="how many windows to train on; all unless given")
    return parser.parse_args()


def make_accelerator(arguments: argparse.Namespace) -> Accelerator:
    # Started by a launcher without GPUs, accelerate must be told what DeepSpeed's processes are to talk through.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, kwargs_handlers=handlers)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        # There is no DataLoader from which accelerate could tell.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = arguments.batch
    return accelerator


@torch.no_grad()
def evaluate(model: torch.nn.Module, arguments: argparse.Namespace, device: torch.device) -> float:
    """Loss on text that is held out, in nats a byte."""
    windows = TextDataset("eval", arguments.length, limit=16).windows.long().to(device)
    model.eval()
    losses = [model(part, part)[1].float() for part in windows.split(4)]
    model.train()
    return torch.stack(losses).mean().item()


def train(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: AcceleratedEMA,
          arguments: argparse.Namespace) -> None:  # fmt: skip
    data = TextDataset("train", arguments.length, limit=arguments.windows)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes, "seed": int(ema.t)}
    samples = int(ema.t)
    last = arguments.steps * ACCUMULATED * arguments.batch * accelerator.num_processes
    for batch in batches(data, arguments.batch, **place):
        if samples >= last:
            break
        tokens = batch["input_ids"].to(accelerator.device)
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens, tokens)[1])
            optimizer.step()
            optimizer.zero_grad()
        samples += arguments.batch * accelerator.num_processes
        ema.update(samples)  # does nothing within gradient accumulation


def main() -> None:
    arguments = parse()
    accelerator = make_accelerator(arguments)
    torch.manual_seed(0)
    model = GPT(width=arguments.width, layers=arguments.layers, heads=4, length=arguments.length)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    every = arguments.snapshot_every * ACCUMULATED * arguments.batch * accelerator.num_processes
    ema = prepare_ema(accelerator, model, arguments.out / "ema", (0.05, 0.10), every, "samples")
    if arguments.resume:
        accelerator.load_state(str(arguments.out / "checkpoint"))
    train(accelerator, model, optimizer, ema, arguments)
    accelerator.save_state(str(arguments.out / "checkpoint"))
    raw = evaluate(model, arguments, accelerator.device)
    with ema.ema.swapped(sigma_rel=0.10):
        averaged = evaluate(model, arguments, accelerator.device)
    ema.close()
    kind = f"{type(model).__name__} of {type(next(model.parameters())).__name__}"
    accelerator.print(f"{kind} on {accelerator.num_processes} ranks, {ema.t:g} samples")
    accelerator.print(f"loss of the weights {raw:.4f}, of their average {averaged:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
