"""Checkpoints of Lightning, ``*.ckpt``: the weights, or the average that a callback put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Foreign, Reading, Tensors, single_label
from sharded_phema.importers.extent import Extent
from sharded_phema.importers.naming import below, files_in, sizes_of, time_of
from sharded_phema.importers.torchfile import load

__all__ = ["find_lightning"]

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
_PLAIN = [("argparse", "Namespace"), ("pathlib", "PosixPath"), ("pathlib", "Path"), ("pathlib._local", "PosixPath")]


def find_lightning(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Files ``*.ckpt`` in a folder or below it, or one; training time is ``global_step``, or in names by a pattern.

    Raises:
        StoreError: There are none, one is sharded, or one holds an average of which it was not said what it is.
    """
    label = single_label(reading)
    files = files_in(source, ["*.ckpt", "*/*.ckpt"], "files *.ckpt")
    return [_found(path, reading, label) for path in files]


def _found(path: Path, reading: Reading, label: str) -> Foreign:
    if path.is_dir():
        raise StoreError(f"{path}: is a sharded checkpoint", hint="read it with --from dcp or --from deepspeed")
    value = _loaded(path)
    averaged = "averaging_state" in value or "current_model_state" in value
    if averaged and not reading.profiles and not reading.key:
        raise StoreError(
            f"{path}: its state_dict is the average of a WeightAveraging callback, and the file does not tell which",
            hint="give --profile, such as exponential:decay=0.999 (every n steps: the n-th root of the decay), or "
            "uniform; or --key current_model_state for the weights themselves",
        )
    t = time_of(path.stem, reading.time_pattern, str(path)) if reading.time_pattern else _step(value, path)
    return Foreign(str(path), t, reading.start or 0.0, partial(_open, path, reading, label), sizes_of([path]))


def _open(path: Path, reading: Reading, label: str) -> dict[str, Tensors]:
    return {label: below(_loaded(path), reading.key or "state_dict", reading.prefix, str(path))}


def _loaded(path: Path) -> dict[str, Any]:
    value = load(Extent.whole(path), known=_is_plain)
    if not isinstance(value, dict) or "state_dict" not in value:
        raise StoreError(f"{path}: holds no state_dict", hint="expected a checkpoint of Lightning; try --from torch")
    return value


def _step(value: dict[str, Any], path: Path) -> float:
    step = value.get("global_step")
    if not isinstance(step, int) or step <= 0:
        raise StoreError(
            f"{path}: expected a global_step above 0, found {step!r:.40}",
            hint="give --time-pattern to read the time from the name",
        )
    return float(step)


def _is_plain(module: str, name: str) -> bool:
    """Classes of hyperparameters and states that are kept as what they hold, and never looked at."""
    return (module, name) in _PLAIN or module.partition(".")[0] in _PACKAGES
