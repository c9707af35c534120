"""Skeleton: a module made of parameters alone, under the names of a model of diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharded_phema.errors import ModelMismatch, UnsupportedModel
from sharded_phema.layout import canonical_name

__all__ = ["empty_model", "local_part", "names_of", "save_model", "skeleton", "write_averages"]


def empty_model(model_cls: Any, config: Any) -> Any:
    """A model of a class of diffusers whose parameters take no memory; its buffers are there."""
    with init_empty_weights(include_buffers=False):
        return model_cls.from_config(config)


def names_of(model: nn.Module | None, parameters: Sequence[Tensor]) -> list[str]:
    """Names of some parameters, which are those of a model in its own order; their numbers where there is no model.

    Raises:
        ModelMismatch: Their number or a shape is another.
    """
    if model is None:
        return [str(index) for index in range(len(parameters))]
    named = [(canonical_name(path), tuple(param.shape)) for path, param in model.named_parameters()]
    for (name, shape), param in zip(named, parameters, strict=False):
        if tuple(param.shape) != shape:
            raise ModelMismatch(
                f"{name}: expected shape {shape}, as {type(model).__qualname__} has it, found {tuple(param.shape)}",
                hint="give all parameters of that model in its own order; FSDP1 and ZeRO 3 show flat pieces instead: "
                "use PostHocEMA(model, ...) there",
            )
    if len(named) != len(parameters):
        raise ModelMismatch(
            f"expected the {len(named)} parameters of {type(model).__qualname__}, found {len(parameters)}",
            hint="give model.parameters(), and the model_cls and model_config of the same model",
        )
    return [name for name, _ in named]


def skeleton(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> nn.Module:
    """A module with just these parameters, the very same, under dotted names."""
    root = nn.Module()
    for name, param in zip(names, parameters, strict=True):
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, param)
    return root


def local_part(param: Tensor) -> Tensor:
    """Alias of what this rank holds of a parameter."""
    local: Tensor = param.to_local() if isinstance(param, DTensor) else param
    return local.detach()


@torch.no_grad()
def write_averages(named: Iterable[tuple[str, Tensor]], averages: Mapping[str, Tensor]) -> None:
    """Copy averages into this rank's parts of parameters, rounded.

    Args:
        named: Names and parameters; those without an average stay as they are.
        averages: As ``PostHocEMA.state_dict`` holds them.

    Raises:
        UnsupportedModel: The ranks share out the average of what each of them holds whole.
    """
    for name, param in named:
        if name in averages:
            _write(name, param, averages[name])


def _write(name: str, param: Tensor, average: Tensor) -> None:
    local = local_part(param)
    pieces = list(average.pieces.values()) if hasattr(average, "pieces") else [average]
    if sum(piece.numel() for piece in pieces) != local.numel():
        raise UnsupportedModel(
            f"{name}: this rank averages {sum(piece.numel() for piece in pieces)} of the {local.numel()} elements that "
            "it holds, as all ranks hold them",
            hint="let fully_shard have all parameters, or use PostHocEMA(model, ...) and its swapped()",
        )
    if local.is_contiguous():
        flat, start = local.view(-1), 0
        for piece in pieces:
            flat[start : start + piece.numel()].copy_(piece.reshape(-1))
            start += piece.numel()
    else:
        local.copy_(pieces[0].reshape(local.shape))


@torch.no_grad()
def save_model(model: Any, weights: Mapping[str, Tensor], numbers: Mapping[str, Any], path: Path) -> None:
    """Save a new model of diffusers with other weights, and numbers in its configuration.

    Args:
        model: Filled here.
        weights: By name; what is not among them stays as it is.
        numbers: For the configuration.
        path: Where to; what was rebuilt there on the way is removed.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in weights:
            tensor.copy_(weights[name])
    model.register_to_config(**numbers)
    model.save_pretrained(path)
    shutil.rmtree(path / "rebuilt", ignore_errors=True)
