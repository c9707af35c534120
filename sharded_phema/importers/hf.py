"""Folders of Hugging Face trainers: ``checkpoint-N`` with safetensors, in one file or several and an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.folder.contract import is_name
from sharded_phema.importers.contract import Foreign, Lazy, Reading, Tensors, single_label, within
from sharded_phema.importers.naming import files_in, sizes_of, time_of
from sharded_phema.importers.safetensors import open_safetensors

__all__ = ["find_hf"]

_NAMES = ("model", "diffusion_pytorch_model", "adapter_model")


def find_hf(source: Path, reading: Reading) -> Sequence[Foreign]:
    """Checkpoints in a folder that holds ``checkpoint-N`` folders, or folders of any names where a pattern is given.

    Raises:
        StoreError: There are none, or one holds no safetensors.
    """
    label = single_label(reading)
    pattern = "*" if reading.time_pattern else "checkpoint-*"
    folders = [path for path in files_in(source, [pattern], "folders checkpoint-N") if path.is_dir()]
    return [_found(folder, reading, label) for folder in folders]


def _found(folder: Path, reading: Reading, label: str) -> Foreign:
    files = _files(folder, reading.key)
    t = time_of(folder.name, reading.time_pattern, str(folder))
    return Foreign(str(folder), t, reading.start or 0.0, partial(_open, files, folder, reading, label), sizes_of(files))


def _open(files: Sequence[Path], folder: Path, reading: Reading, label: str) -> Mapping[str, Tensors]:
    tensors: dict[str, Lazy] = {}
    for path in files:
        found = open_safetensors(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise StoreError(f"{folder}: {twice[0]} is in two files", hint="remove what is left of an earlier save")
        tensors |= found
    return {label: within(tensors, reading.prefix, str(folder))}


def _files(folder: Path, key: str) -> tuple[Path, ...]:
    """The files of the model in a folder, or in the part of it that the key names, such as ``unet_ema``."""
    inner = folder / key
    if key and not is_name(key):
        raise StoreError(f"--key {key!r}: expected the name of a folder in each checkpoint", hint="such as unet_ema")
    for name in _NAMES:
        if (index := inner / f"{name}.safetensors.index.json").is_file():
            return _indexed(index)
        if (single := inner / f"{name}.safetensors").is_file():
            return (single,)
    raise StoreError(
        f"{inner}: expected {' or '.join(f'{name}.safetensors' for name in _NAMES)}, found none",
        hint="name the part of the checkpoint with --key, such as unet_ema; .bin files are read with --from torch",
    )


def _indexed(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{index}: is no index: {error}", hint="take it from a backup") from error
    for name in names:
        if not isinstance(name, str) or not is_name(name) or not (index.parent / name).is_file():
            raise StoreError(
                f"{index}: names the file {str(name)[:80]!r}, which is not beside it", hint="copy it there"
            )
    return tuple(index.parent / name for name in names)
