"""Rivals: the averages of a made run as other libraries keep them, and what these libraries rebuild from that."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from made import Made, whole_average
from sharded_phema.manifest import Parameter
from sharded_phema.store import Run
from sharded_phema.tensorfile import torch_dtype

__all__ = ["KEEPERS", "dcp_loader", "ema_synthesis", "missing", "size_of"]

_NOTE = "complete"


def missing(way: str, made: Made) -> str:
    """Why a rival cannot be measured here; empty where it can."""
    if way == "ema-pytorch" and importlib.util.find_spec("ema_pytorch") is None:
        return "ema-pytorch is not installed"
    if way == "ema-pytorch" and len(made.recipe.sigma_rels) < 2:
        return "ema-pytorch needs two tracked averages or more"
    folder = made.folder / way
    if (folder / _NOTE).exists():
        return ""
    free = shutil.disk_usage(made.folder).free
    if size_of(made) > free - (4 << 30):
        return f"its files would take {size_of(made) / 1e9:.0f} GB more, and {free / 1e9:.0f} GB are free"
    return ""


def size_of(made: Made) -> int:
    """Bytes of all stored averages."""
    recipe = made.recipe
    return recipe.parameters * recipe.snapshots * len(recipe.sigma_rels) * torch_dtype(recipe.dtype).itemsize


Averages = Sequence[Sequence[Tensor]]
"""All tensors of each average, in the model's order."""


def _kept(keep: Callable[[Made, int, Averages, Path], None]) -> Callable[[Made, Path], None]:
    """What stores every snapshot of a run in a folder, unless that was done before."""

    def write(made: Made, folder: Path) -> None:
        if (folder / _NOTE).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        walks, dtype = made.walks, torch_dtype(made.recipe.dtype)
        for snapshot in range(made.recipe.snapshots):
            each = (whole_average(made, walks, snapshot, average) for average in range(len(made.recipe.sigma_rels)))
            keep(made, snapshot, [[tensor.to(dtype) for tensor in tensors] for tensors in each], folder)
        (folder / _NOTE).touch()

    return write


def _as_ema_pytorch(made: Made, snapshot: int, averages: Averages, folder: Path) -> None:
    """Checkpoints as ``ema_pytorch.PostHocEMA.checkpoint`` writes them, one an average."""
    t = (snapshot + 1) * made.recipe.steps
    for average, tensors in enumerate(averages):
        state = {"initted": torch.tensor(1.0), "step": torch.tensor(float(t))}
        state |= {f"ema_model.{index}": tensor for index, tensor in enumerate(tensors)}
        torch.save(state, folder / f"{average}.{t}.pt")


def _as_dcp(made: Made, snapshot: int, averages: Averages, folder: Path) -> None:
    """A checkpoint of torch.distributed.checkpoint, by one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is meant
        dcp_save(_state(made.parameters, averages), checkpoint_id=folder / str(snapshot), no_dist=True)


def _state(parameters: Sequence[Parameter], averages: Averages) -> dict[str, Tensor]:
    return {
        f"{average}.{parameter.name}": tensor
        for average, tensors in enumerate(averages)
        for parameter, tensor in zip(parameters, tensors, strict=True)
    }


KEEPERS = {"ema-pytorch": _kept(_as_ema_pytorch), "dcp.load": _kept(_as_dcp)}
"""What each rival's files are written by."""


def dcp_loader(
    folder: Path, run: Run, sigma_rels: Sequence[float]
) -> Callable[[int], Iterator[tuple[int, str, int, Tensor]]]:
    """Loads a snapshot's averages into tensors that are made once."""
    dtype, parameters = torch_dtype(run.record.dtype), run.record.parameters
    state = _state(parameters, [[torch.zeros(p.shape, dtype=dtype) for p in parameters] for _ in sigma_rels])

    def load(number: int) -> Iterator[tuple[int, str, int, Tensor]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(state, checkpoint_id=folder / str(number), no_dist=True)
        for key, tensor in state.items():
            average, _, name = key.partition(".")
            yield int(average), name, 0, tensor

    return load


def ema_synthesis(
    folder: Path, parameters: Sequence[Parameter], sigma_rels: Sequence[float]
) -> Callable[[float], list[Tensor]]:
    """``ema_pytorch.PostHocEMA`` with a model of these tensors; gives the tensors of a width."""
    ema_pytorch: Any = importlib.import_module("ema_pytorch")  # optional
    model: Any = nn.ParameterList(torch.zeros(parameter.shape) for parameter in parameters)
    ema = ema_pytorch.PostHocEMA(
        model, sigma_rels=tuple(sigma_rels), checkpoint_every_num_steps="manual", checkpoint_folder=str(folder)
    )

    def synthesise(width: float) -> list[Tensor]:
        with torch.no_grad():
            return [value.detach() for value in ema.synthesize_ema_model(sigma_rel=width).ema_model.parameters()]

    return synthesise
