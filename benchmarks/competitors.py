"""Competitors: the update of averages as others do it, behind one face, so that all are checked and timed alike."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sharded_phema.kernels import kernels_for

__all__ = ["COMPETITORS", "Entry", "model_of"]


@dataclass(frozen=True)
class Entry:
    """One competitor that keeps averages of a model.

    Attributes:
        update: Takes the weights as they are now into every average.
        averages: For each average, its tensors in the order of the parameters.
    """

    update: Callable[[], object]
    averages: Sequence[Sequence[Tensor]]


def model_of(count: int, elements: int, dtype: torch.dtype) -> nn.Module:
    """A module of so many equal tensors."""
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(elements // count).to(dtype)) for _ in range(count)])


def copies(model: nn.Module, width: int) -> list[list[Tensor]]:
    """Float32 averages that begin where the parameters are."""
    return [[param.detach().float().clone() for param in model.parameters()] for _ in range(width)]


def ours(kernel: str, model: nn.Module, weights: Sequence[float]) -> Entry:
    """A kernel of this package."""
    averages = copies(model, len(weights))
    (made,) = kernels_for(kernel, averages, [param.detach() for param in model.parameters()])
    return Entry(partial(made, weights), averages)


def by_hand(step: Callable[[list[Tensor], list[Tensor], float], object], model: nn.Module, weights: Any) -> Entry:
    """Float32 averages that are updated one after the other."""
    averages, params = copies(model, len(weights)), [param.detach() for param in model.parameters()]

    def update() -> None:
        for average, weight in zip(averages, weights, strict=True):
            step(average, params, weight)

    return Entry(update, averages)


def lerp_loop(average: list[Tensor], params: list[Tensor], weight: float) -> None:
    for a, p in zip(average, params, strict=True):
        a.lerp_(p.to(a.dtype), weight)


def foreach_lerp(average: list[Tensor], params: list[Tensor], weight: float) -> None:
    """What is not float32 is cast first: torch's operation takes one dtype only."""
    torch._foreach_lerp_(average, [p.float() for p in params], weight)


def foreach_mul_add(average: list[Tensor], params: list[Tensor], weight: float) -> None:
    torch._foreach_mul_(average, 1 - weight)
    torch._foreach_add_(average, params, alpha=weight)


def tools(
    make: Callable[[nn.Module, float], tuple[Callable[[], object], Any]], model: nn.Module, weights: Any
) -> Entry:
    """A tool that keeps one average: as many of them as there are weights."""
    made = [make(model, 1 - weight) for weight in weights]
    return Entry(lambda: [update() for update, _ in made], [list(kept) for _, kept in made])


def averaged_model(model: nn.Module, decay: float) -> tuple[Callable[[], object], Any]:
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    kept.update_parameters(model)  # the first call copies
    return partial(kept.update_parameters, model), kept.module.parameters()


def diffusers(model: nn.Module, decay: float) -> tuple[Callable[[], object], Any]:
    kind = importlib.import_module("diffusers.training_utils").EMAModel
    kept = kind(model.parameters(), decay=decay, min_decay=decay, foreach=True)
    kept.step(model.parameters())  # the first call copies
    return lambda: kept.step(model.parameters()), kept.shadow_params


def timm(model: nn.Module, decay: float) -> tuple[Callable[[], object], Any]:
    kept = timm_file().ModelEmaV3(model, decay=decay, dtype=torch.float32)
    return partial(kept.update, model), kept.module.parameters()


def timm_file() -> ModuleType:
    """The one file of timm: importing the package takes torchvision, of the same build as torch."""
    found = importlib.util.find_spec("timm")
    if found is None:
        raise ImportError("No module named 'timm'")
    path = Path((found.submodule_search_locations or [""])[0], "utils", "model_ema.py")
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ema_pytorch(model: nn.Module, decay: float) -> tuple[Callable[[], object], Any]:
    kind = importlib.import_module("ema_pytorch").EMA
    kept = kind(model, beta=decay, min_value=decay, update_after_step=-1, update_every=1, use_foreach=True)
    kept.update()  # the first call copies
    return kept.update, kept.ema_model.parameters()


COMPETITORS: dict[str, Callable[[nn.Module, Sequence[float]], Entry]] = {
    "ours, fused": partial(ours, "fused"),
    "ours, foreach": partial(ours, "foreach"),
    "ours, triton": partial(ours, "triton"),
    "ours, reference (float64)": partial(ours, "reference"),
    "lerp, one tensor after the other": partial(by_hand, lerp_loop),
    "torch._foreach_lerp_": partial(by_hand, foreach_lerp),
    "torch._foreach_mul_, _foreach_add_": partial(by_hand, foreach_mul_add),
    "torch AveragedModel": partial(tools, averaged_model),
    "diffusers EMAModel": partial(tools, diffusers),
    "timm ModelEmaV3": partial(tools, timm),
    "ema-pytorch EMA": partial(tools, ema_pytorch),
}
"""Each makes its entry from a model and the weight that the parameters get in each average."""
