"""Parts: the module and the optimizer that a user gave, as DeepSpeed made them; refusals of what cannot be mapped."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from sharded_phema.backends.zero.masters import KEEPERS, OWN_WEIGHTS, Keeper
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import canonical_name

__all__ = ["known", "parts_of", "steps_of"]

_REFUSED_OPTIONS = {
    "swap_optimizer": ("masters are swapped to NVMe", "offload the optimizer to cpu instead"),
    "params_in_nvme_and_cpu": ("weights are swapped to NVMe", "offload parameters to cpu instead"),
    "zenflow": ("some weights are trained beside their masters", "train without zenflow"),
    "zero_quantized_nontrainable_weights": ("frozen weights are kept quantized", "leave that option out"),
    "offloaded_states": ("masters or weights are offloaded at the moment", "call engine.reload_states() first"),
}


def known(model: object, optimizer: object) -> bool:
    """Whether DeepSpeed made the model or the optimizer.

    A module whose parameters an engine took is known without its optimizer, too: to be refused.
    """
    if _is_deepspeed(model, "DeepSpeedEngine") or _is_deepspeed(model, "PipelineModule"):
        return True
    return isinstance(model, nn.Module) and (_unwrapped(optimizer) is not None or _taken(model) is not None)


def parts_of(model: nn.Module, optimizer: object) -> tuple[nn.Module, Keeper, Any]:
    """The module that is trained, how its masters are kept, and DeepSpeed's optimizer that keeps them.

    Args:
        model: An engine or a module.
        optimizer: Beside a module, the engine's optimizer or a wrapper around it.

    Raises:
        UnsupportedModel: No optimizer or one that is not known, or options and parameters that cannot be mapped.
    """
    engine = _is_deepspeed(model, "DeepSpeedEngine")
    module: Any = model.module if engine else model
    zero: Any = model.optimizer if engine else _unwrapped(optimizer)
    if _is_deepspeed(module, "PipelineModule"):
        raise UnsupportedModel(
            f"{type(module).__qualname__}: each rank holds only its own stage of the pipeline",
            hint="pipeline parallelism is not supported; train with ZeRO, which needs no stages",
        )
    if not engine and zero is None:
        raise UnsupportedModel(
            f"{_taken(module)}: the parameter belongs to a DeepSpeed engine, whose optimizer keeps its master",
            hint="give the engine instead of its module, or its optimizer with optimizer=engine.optimizer",
        )
    keeper = _keeper(zero)
    _check_options(zero)
    _check_params(module)
    return module, keeper, zero


def steps_of(model: Any, optimizer: object) -> int | None:
    """Steps of an engine that changed the weights; a module beside its optimizer does not tell."""
    if not _is_deepspeed(model, "DeepSpeedEngine"):
        return None
    # Counted are boundaries of gradient accumulation, and those of them at which an overflow was found.
    return int(model.global_steps - model.skipped_steps)


def _keeper(zero: object) -> Keeper:
    name = type(zero).__name__
    if name in KEEPERS:
        return KEEPERS[name]
    if isinstance(zero, torch.optim.Optimizer):
        return OWN_WEIGHTS  # stage 0 in float32: the optimizer is as the user made it
    _refuse(name)


def _refuse(name: str) -> NoReturn:
    if name in ("NoneType", "DummyOptim", "DeepSpeedZeRoOffload"):
        raise UnsupportedModel(
            f"the DeepSpeed engine has no optimizer (it has {name}), so that nothing trains",
            hint="give deepspeed.initialize an optimizer, or name one in its config",
        )
    raise UnsupportedModel(
        f"masters of DeepSpeed's {name} cannot be mapped; expected one of {', '.join(KEEPERS)}",
        hint="train with ZeRO stage 0, 1, 2 or 3, without options that bring another optimizer (ZenFlow, SuperOffload)",
    )


def _is_deepspeed(thing: object, name: str) -> bool:
    """Whether an object is of a class of DeepSpeed's, which may not be installed, or of one derived from it."""
    return any(kind.__name__ == name and kind.__module__.startswith("deepspeed.") for kind in type(thing).__mro__)


def _unwrapped(optimizer: object) -> object:
    """DeepSpeed's optimizer, given as it is or wrapped, as accelerate wraps it; None without one."""
    for _ in range(4):  # an object that calls itself its optimizer must not hang us
        if optimizer is None or _is_deepspeed(optimizer, "DeepSpeedOptimizer"):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _taken(module: nn.Module) -> str | None:
    """Path of the first parameter that an engine took: stage 3 numbers them, stages 1 and 2 map them."""
    marked = (path for path, p in module.named_parameters() if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"))
    return next(marked, None)


def _check_options(zero: object) -> None:
    for option, (problem, mend) in _REFUSED_OPTIONS.items():
        if getattr(zero, option, False):
            raise UnsupportedModel(f"{type(zero).__name__}.{option} is on: {problem}", hint=mend)


def _check_params(module: nn.Module) -> None:
    for path, param in module.named_parameters():
        if not getattr(param, "allreduce", True):
            raise UnsupportedModel(
                f"{canonical_name(path)}: an expert's parameter (allreduce=False), whose name other experts have too",
                hint="expert parallelism is not supported; train with all experts on every rank",
            )
        if getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False):
            raise UnsupportedModel(
                f"{canonical_name(path)}: a slice of a tensor parallel parameter, which does not tell where it lies",
                hint="tensor parallelism is not supported under DeepSpeed; shard with ZeRO alone",
            )
