"""Formats: the readers by name, and the one that a folder looks like."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sharded_phema.errors import StoreError
from sharded_phema.importers.contract import Find, Foreign, Reading
from sharded_phema.importers.dcp import find_dcp, find_torchtitan
from sharded_phema.importers.deepspeed import find_deepspeed
from sharded_phema.importers.edm2 import find_edm2
from sharded_phema.importers.hf import find_hf
from sharded_phema.importers.karras import find_ema_pytorch, find_posthoc_ema
from sharded_phema.importers.lightning import find_lightning
from sharded_phema.importers.torchsave import find_torch

__all__ = ["FORMATS", "find", "format_of"]

FORMATS: dict[str, Find] = {
    "edm2": find_edm2,
    "ema-pytorch": find_ema_pytorch,
    "posthoc-ema": find_posthoc_ema,
    "dcp": find_dcp,
    "torchtitan": find_torchtitan,
    "deepspeed": find_deepspeed,
    "hf": find_hf,
    "lightning": find_lightning,
    "torch": find_torch,
}
"""The reader of each format."""

# The first that the name of some file or folder directly in the source matches, or one a folder below.
_SIGNS = (
    ("edm2", r".*-[0-9]+-[0-9.]+\.pkl"),
    ("dcp", r"([^/]+/)?\.metadata"),
    ("deepspeed", r"([^/]+/)?(bf16_|fp16_)?zero_pp_rank_[^/]*_optim_states\.pt"),
    ("hf", r"checkpoint-[0-9]+/.*\.safetensors"),
    ("lightning", r".*\.ckpt"),
    ("posthoc-ema or ema-pytorch", r"[0-9]+\.[0-9]+\.pt"),
    ("torch", r".*\.(pt|pth|bin)"),
)


def find(source: Path, format: str, reading: Reading) -> tuple[str, list[Foreign]]:
    """What training time counts in a folder of checkpoints, and these, in order of time.

    Args:
        source: Folder of the checkpoints, or one file.
        format: A key of ``FORMATS``; empty for the one that the folder looks like.
        reading: What the files do not tell.

    Raises:
        StoreError: There are none of the format.
    """
    if not source.exists():
        raise StoreError(f"{source}: there is nothing", hint="give the folder in which the checkpoints lie")
    name = format or format_of(source)
    if name not in FORMATS:
        raise StoreError(f"--from {name}: unknown format", hint=f"there are {', '.join(FORMATS)}")
    found = sorted(FORMATS[name](source, reading), key=lambda one: one.t)
    return reading.unit or ("images" if name == "edm2" else "steps"), found


def format_of(source: Path) -> str:
    """The format that the names in a folder, and in the folders below it, tell.

    Raises:
        StoreError: They tell none, or two that only the user can tell apart.
    """
    names = list(_names(source))
    found = next((format for format, sign in _SIGNS if any(re.fullmatch(sign, name) for name in names)), "")
    if found not in FORMATS:
        told = f"looks like {found}" if found else "looks like none of the known formats"
        raise StoreError(f"{source}: {told}", hint=f"say which it is: --from {', '.join(FORMATS)}")
    return found


def _names(source: Path) -> Iterable[str]:
    if source.is_file():
        yield source.name
        return
    for path in sorted(source.iterdir()):
        yield path.name
        if path.is_dir():
            yield from (f"{path.name}/{inner.name}" for inner in sorted(path.iterdir()))
