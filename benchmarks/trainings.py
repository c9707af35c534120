"""Trainings: real runs whose weights are recorded at every step, so that any average can be had afterwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from networks import Loss, classifier, denoiser, language_model

__all__ = ["TRAININGS", "Training", "Trajectory", "recorded"]

Rate = Callable[[float], float]
"""Learning rate, as a share of its peak, of a fraction of the run in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Training:
    """One real run.

    Attributes:
        name: Short, for tables and file names.
        title: What it is, for the reader.
        build: Gives the model and its loss; True asks for a smaller network.
        optimizer: Gives the optimizer of the parameters, at the peak of the rate.
        rate: Schedule.
        family: ``adam`` or ``sgd``: which bar applies.
    """

    name: str
    title: str
    build: Callable[[bool], tuple[nn.Module, Loss]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate: Rate
    family: str


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Recorded weights of a training.

    Attributes:
        training: The run.
        theta: Sampled parameters before the first step and after every step, float32 (steps + 1, sampled).
        about: What was recorded with them: seconds, losses, numbers of parameters.
    """

    training: Training
    theta: NDArray[np.float32]
    about: dict[str, object]

    @property
    def steps(self) -> int:
        """Optimizer steps; also the training time at the end."""
        return len(self.theta) - 1


def constant(_: float) -> float:
    """No schedule."""
    return 1.0


def warm_then_constant(u: float) -> float:
    """Linear warm-up over 2 % of the run."""
    return min(1.0, u / 0.02)


def warm_then_cosine(u: float) -> float:
    """Linear warm-up over 2 % of the run, then half a cosine down to 0."""
    return u / 0.02 if u < 0.02 else 0.5 + 0.5 * math.cos(math.pi * (u - 0.02) / 0.98)


def warm_then_inverse_root(u: float) -> float:
    """Linear warm-up over 2 %, constant until 10 %, then 1 / sqrt(t), as the paper trains its models."""
    return min(1.0, u / 0.02) / math.sqrt(max(1.0, u / 0.1))


def _language(quick: bool) -> tuple[nn.Module, Loss]:
    return language_model(width=16 if quick else 48, batch=2 if quick else 12, context=16 if quick else 64)


def _denoiser(quick: bool) -> tuple[nn.Module, Loss]:
    return denoiser(width=16 if quick else 96, batch=16 if quick else 128)


def _classifier(quick: bool) -> tuple[nn.Module, Loss]:
    return classifier(width=16 if quick else 128, batch=16 if quick else 64)


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.99), foreach=True)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4, foreach=True)


TRAININGS = (
    Training("denoiser", "digits denoiser, Adam, constant rate", _denoiser, _adam, constant, "adam"),
    Training("denoiser-root", "the same, rate ~ 1/sqrt(t)", _denoiser, _adam, warm_then_inverse_root, "adam"),
    Training("lm", "language model, AdamW, warm-up, constant", _language, _adamw, warm_then_constant, "adam"),
    Training("lm-cosine", "the same, warm-up, cosine to 0", _language, _adamw, warm_then_cosine, "adam"),
    Training("classifier", "digits classifier, SGD with momentum", _classifier, _sgd, constant, "sgd"),
)


def recorded(
    training: Training,
    folder: Path,
    *,
    steps: int,
    sampled: int,
    quick: bool,
    progress: Callable[[range, str], Iterable[int]],
) -> Trajectory:
    """The trajectory, from the cache folder where an earlier call left it, else by training now.

    Args:
        training: The run.
        folder: Cache of trajectories.
        steps: Optimizer steps.
        sampled: Most parameters to record; drawn at random once.
        quick: A small network.
        progress: Gives the items of a range, and shows how far they have come under a label.
    """
    stem = folder / f"{training.name}-{steps}-{sampled}{'-quick' if quick else ''}"
    weights, note = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # The note is written last: a run that was cut short is not found again.
        note.write_text(json.dumps(_train(training, weights, steps, sampled, quick, progress)))
    return Trajectory(training, np.load(weights, mmap_mode="r"), json.loads(note.read_text()))


def _train(
    training: Training,
    path: Path,
    steps: int,
    sampled: int,
    quick: bool,
    progress: Callable[[range, str], Iterable[int]],
) -> dict[str, object]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, loss = training.build(quick)
    parameters = list(model.parameters())
    optimizer = training.optimizer(parameters)
    peak = optimizer.param_groups[0]["lr"]
    total = sum(p.numel() for p in parameters)
    index = torch.randperm(total, generator=generator)[:sampled].sort().values
    theta = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(steps + 1, len(index)))
    theta[0] = _sample(parameters, index)
    losses, begin = [], time.perf_counter()
    for step in progress(range(1, steps + 1), f"training {training.name}"):
        optimizer.param_groups[0]["lr"] = peak * training.rate(step / steps)
        batch_loss = loss(generator)
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
        theta[step] = _sample(parameters, index)
        losses.append(batch_loss.item())
    theta.flush()
    tenth = max(1, steps // 10)
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": total,
        "sampled": len(index),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-tenth:])),
    }


@torch.no_grad()
def _sample(parameters: list[nn.Parameter], index: torch.Tensor) -> NDArray[np.float32]:
    return torch.cat([p.reshape(-1) for p in parameters])[index].numpy()
