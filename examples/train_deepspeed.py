"""DeepSpeed: a small GPT on the sources of Python's standard library, with averages of its weights.

Start it with ``launch/deepspeed.sh zero3 --out runs/zero3``; again with ``--resume`` it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from sharded_phema import PostHocEMA, load_checkpoint, save_checkpoint

from gpt import GPT
from text import TextDataset, batches


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="of DeepSpeed, such as launch/configs/zero2.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for averages and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps altogether")
    parser.add_argument("--snapshot-every", type=int, default=100, help="optimizer steps between snapshots")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="bytes in a window")
    parser.add_argument("--windows", type=int, default=None, help="how many windows to train on; all unless given")
    parser.add_argument("--local_rank", type=int, default=0, help="the launcher says it")
    return parser.parse_args()


def make_engine(arguments: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = GPT(width=arguments.width, layers=arguments.layers, heads=4, length=arguments.length)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=json.loads(arguments.config.read_text())
    )
    return engine


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, arguments: argparse.Namespace) -> float:
    """Loss on text that is held out, in nats a byte."""
    held_out = TextDataset("eval", arguments.length, limit=16)
    windows = held_out.windows.long().to(engine.device)
    engine.eval()
    losses = [engine(part, part)[1].float() for part in windows.split(4)]
    engine.train()
    return torch.stack(losses).mean().item()


def train(engine: deepspeed.DeepSpeedEngine, ema: PostHocEMA, arguments: argparse.Namespace) -> None:
    data = TextDataset("train", arguments.length, limit=arguments.windows)
    place = {"rank": dist.get_rank(), "world": dist.get_world_size(), "seed": engine.global_steps}
    for batch in batches(data, engine.train_micro_batch_size_per_gpu(), **place):
        if engine.global_steps >= arguments.steps:
            break
        tokens = batch["input_ids"].to(engine.device)
        engine.backward(engine(tokens, tokens)[1])
        engine.step()
        # At every micro-batch: the engine tells which of them were optimizer steps.
        ema.update(engine.global_samples)


def main() -> None:
    arguments = parse()
    deepspeed.init_distributed()
    engine = make_engine(arguments)
    every = arguments.snapshot_every * engine.train_batch_size()
    ema = PostHocEMA(engine, arguments.out / "ema", sigma_rels=(0.05, 0.10), snapshot_every=every, unit="samples")
    if arguments.resume:
        engine.load_checkpoint(str(arguments.out / "checkpoint"))
        load_checkpoint(ema, arguments.out / "checkpoint" / "ema")
    train(engine, ema, arguments)
    engine.save_checkpoint(str(arguments.out / "checkpoint"))
    save_checkpoint(ema, arguments.out / "checkpoint" / "ema")
    raw = evaluate(engine, arguments)
    with ema.swapped(sigma_rel=0.10):
        averaged = evaluate(engine, arguments)
    ema.close()
    if dist.get_rank() == 0:
        stage, world = engine.zero_optimization_stage(), dist.get_world_size()
        print(f"ZeRO {stage} on {world} ranks, {engine.global_steps} steps, {ema.t:g} samples", flush=True)
        print(f"loss of the weights {raw:.4f}, of their average {averaged:.4f}", flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
