"""Decay of the learning rate: chosen after the fact from snapshots, beside runs that really decayed.

A small GPT learns the sources of Python's standard library, byte by byte, at a constant rate. From the snapshots of its
averages, decays of the rate over the last fifth are rebuilt. Two more runs begin with its weights and optimizer at the
start of that fifth, and go through the same batches with a rate that really falls.

python examples/posthoc_decay.py --out runs/decay
torchrun --standalone --nproc-per-node 2 examples/posthoc_decay.py --out runs/decay
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_phema import PostHocEMA, load_into
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gpt import GPT
from text import TextDataset, batches

FRACTION = 0.2
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
}
WIDTHS = ("0.02", "0.03", "0.05", "0.07", "0.10", "0.15", "0.20")
SNAPSHOTS = 20
POINTS = 8
"""How often the runs are looked at while the rate falls."""

Curve = list[tuple[int, float]]
"""Validation losses, by step."""


@dataclass(frozen=True, slots=True)
class Options:
    """One experiment; the batch is that of each rank, of windows of ``length`` bytes."""

    out: Path
    steps: int
    width: int
    layers: int
    length: int
    batch: int
    rate: float
    windows: int

    @property
    def turn(self) -> int:
        """Last step before the decay."""
        return round(self.steps * (1.0 - FRACTION))


def parse_options() -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/decay"), help="folder of the run, which must be new")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width of the GPT (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="its blocks (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step on each rank (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=2048, help="held-out windows (default: %(default)s)")
    return Options(**vars(parser.parse_args()))


def check_new(out: Path) -> None:
    """Stop where the folder is there already; every rank looks before any of them makes it."""
    taken = out.exists()
    if dist.is_initialized():
        dist.barrier()
    if taken:
        raise SystemExit(f"error: {out} is there already\nhint: remove it or name another folder with --out")


class Experiment:
    """A model, its data, and what trains it: the same at every step, whatever ran before."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.text = TextDataset("train", options.length)
        held_out = TextDataset("eval", options.length, options.windows).windows
        self.held_out = held_out[self.rank :: self.world].long().to(device)
        torch.manual_seed(0)
        self.model = GPT(width=options.width, layers=options.layers, length=options.length).to(device)
        if self.world > 1:
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
            assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        self.fresh_optimizer()

    def fresh_optimizer(self) -> None:
        """An optimizer that has seen nothing yet."""
        # Where gradients lie about, torch's state dictionaries leave the state of a new optimizer out.
        self.model.zero_grad()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.options.rate, betas=(0.9, 0.95))

    def train(self, steps: range, factor: Callable[[int], float], after: Callable[[int], object]) -> None:
        """Make some steps, each at the rate times its factor."""
        stream = batches(self.text, self.options.batch, rank=self.rank, world=self.world)
        self.model.train()
        for step, batch in zip(steps, islice(stream, steps.start - 1, None), strict=False):
            for group in self.optimizer.param_groups:
                group["lr"] = self.options.rate * factor(step)
            loss = self.model(batch["input_ids"].to(self.device), batch["labels"].to(self.device))[1]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            after(step)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss of the held-out text, in nats a byte."""
        self.model.eval()
        losses = [self.model(part, part)[1] * len(part) for part in self.held_out.split(64)]
        total = torch.stack([torch.stack(losses).sum(), torch.tensor(float(len(self.held_out)), device=self.device)])
        if self.world > 1:
            dist.all_reduce(total)
            # A forward without a backward leaves the root's weights gathered, and an optimizer would be given those.
            self.model.reshard()
        self.model.train()
        return (total[0] / total[1]).item()

    def store(self, folder: Path) -> None:
        """Weights and the optimizer's state, each rank its own."""
        dcp.save(
            dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True)),
            checkpoint_id=folder,
        )

    def restore(self, folder: Path) -> None:
        """The same back."""
        self.fresh_optimizer()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def constant_run(experiment: Experiment, watch: Callable[[int], object] = lambda step: None) -> Curve:
    """Train at a constant rate after a short warm-up; snapshots of averages, and the state at the turn, are kept."""
    options, curve = experiment.options, Curve()
    looks = _looks(options)
    warmup = max(1, options.steps // 50)
    ema = PostHocEMA(experiment.model, options.out / "ema", snapshot_every=max(1, options.steps // SNAPSHOTS))

    def after(step: int) -> None:
        ema.update(step)
        watch(step)
        if step == options.turn:
            experiment.store(options.out / "turn")
        if step in looks:
            curve.append((step, experiment.loss()))

    experiment.train(range(1, options.steps + 1), lambda step: min(1.0, step / warmup), after)
    ema.close()
    return curve


def decayed_run(experiment: Experiment, shape: str) -> Curve:
    """Go on from the turn, through the same batches, with a rate that falls to zero."""
    options, curve = experiment.options, Curve()
    looks, turn, length = _looks(options), options.turn, options.steps - options.turn
    experiment.restore(options.out / "turn")

    def factor(step: int) -> float:
        # The rate as it stands when the step begins: what averaging over whole steps corresponds to.
        return SHAPES[shape]((step - 1 - turn) / length)

    def after(step: int) -> None:
        if step in looks:
            curve.append((step, experiment.loss()))

    experiment.train(range(turn + 1, options.steps + 1), factor, after)
    return curve


def rebuilt(experiment: Experiment, target: str) -> tuple[float, float]:
    """Validation loss of a rebuilt average, and its forecast error relative to |raw weights - target|."""
    plan = load_into(experiment.model, target, experiment.options.out / "ema")
    return experiment.loss(), plan.targets[0].fit.forecast


def _looks(options: Options) -> set[int]:
    length = options.steps - options.turn
    return {options.turn + length * i // POINTS for i in range(POINTS + 1)}


def run(experiment: Experiment, watch: Callable[[int], object] = lambda step: None) -> dict[str, object]:
    """The whole experiment; its record."""
    options = experiment.options
    curves = {"constant": constant_run(experiment, watch)}
    curves |= {shape: decayed_run(experiment, shape) for shape in SHAPES}
    rows = [{"weights": "constant rate, raw weights", "loss": curves["constant"][-1][1]}]
    for shape in SHAPES:
        rows.append({"weights": f"rate really decayed, {shape}", "loss": curves[shape][-1][1]})
    for target in [*(f"decay:{shape}:{FRACTION}" for shape in SHAPES), *WIDTHS]:
        loss, forecast = rebuilt(experiment, target)
        rows.append({"weights": f"rebuilt `{target}`", "target": target, "loss": loss, "forecast": forecast})
    return {
        "options": asdict(options) | {"out": str(options.out)},
        "ranks": experiment.world,
        "parameters": sum(parameter.numel() for parameter in experiment.model.parameters()),
        "rows": rows,
        "curves": curves,
    }


def table(record: dict[str, object]) -> str:
    """The losses as markdown."""
    lines = ["| weights | validation loss, nats a byte | against the constant rate |", "|---|---|---|"]
    raw = record["rows"][0]["loss"]
    lines += [f"| {row['weights']} | {row['loss']:.4f} | {row['loss'] - raw:+.4f} |" for row in record["rows"]]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, object], path: Path) -> None:
    """Losses while the rate falls, and of the rebuilt averages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    colours = {"constant": "#555555", "linear": "#0072B2", "cosine": "#D55E00"}
    rows = {row.get("target", row["weights"]): row["loss"] for row in record["rows"]}
    for name, curve in record["curves"].items():
        label = "constant rate" if name == "constant" else f"{name} decay, really trained"
        left.plot(*zip(*curve, strict=True), color=colours[name], marker=".", label=label)
        if name != "constant":
            found = rows[f"decay:{name}:{FRACTION}"]
            left.scatter(
                curve[-1][0], found, marker="*", s=110, color=colours[name], zorder=3, label=f"{name}, rebuilt"
            )
            right.axhline(curve[-1][1], color=colours[name], linestyle="--", label=f"{name} decay, really trained")
            right.axhline(found, color=colours[name], linestyle=":", label=f"{name} decay, rebuilt")
    widths = [float(width) for width in WIDTHS]
    right.plot(widths, [rows[width] for width in WIDTHS], color="#009E73", marker="o", label="power width, rebuilt")
    left.set(xlabel="optimizer step", ylabel="validation loss, nats a byte", title="While the rate falls")
    right.set(xlabel=r"averaging length $\sigma_\mathrm{rel}$", title="Chosen after the fact")
    for ax in (left, right):
        ax.grid(color="#E5E5E5")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@contextmanager
def ranks() -> Iterator[torch.device]:
    """This process's device, in the process group of torchrun if there is one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Train, rebuild, compare; write ``decay.json``, ``decay.md`` and ``decay.png``."""
    options = parse_options()
    with ranks() as device:
        check_new(options.out)
        experiment = Experiment(options, device)
        record = run(experiment)
        if experiment.rank == 0:
            (options.out / "decay.json").write_text(json.dumps(record, indent=1) + "\n")
            (options.out / "decay.md").write_text(table(record))
            draw(record, options.out / "decay.png")
            print(table(record), end="")


if __name__ == "__main__":
    main()
