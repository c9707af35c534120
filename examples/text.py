"""Real text that is on every machine: the sources of Python's standard library, byte by byte, as data to train on."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 256
"""Tokens are bytes."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class TextDataset(Dataset[dict[str, Tensor]]):
    """Windows of text, end to end. Every tenth file, by its name, is held out for evaluation.

    Args:
        split: "train" or "eval".
        length: Bytes in a window.
        limit: Most windows; all unless given.
    """

    def __init__(self, split: str, length: int, limit: int | None = None) -> None:
        enough = None if limit is None else length * limit
        text = torch.frombuffer(bytearray(_text(split == "eval", enough)), dtype=torch.uint8)
        self.windows = text[: len(text) // length * length].view(-1, length)[:limit]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, the same (length,) of int64: models of Hugging Face shift labels themselves."""
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window.clone()}


def batches(
    data: TextDataset, size: int, *, rank: int = 0, world: int = 1, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Batches without end, in an order of chance that all ranks agree on; each rank is given its own windows.

    Args:
        data: What to draw from.
        size: Windows of a batch on one rank.
        rank: This process.
        world: How many processes there are.
        seed: Of the order.

    Yields:
        ``input_ids`` and ``labels``, both (size, length) of int64.
    """
    chance = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(len(data), (world, size), generator=chance)[rank]
        windows = data.windows[drawn].long()
        yield {"input_ids": windows, "labels": windows.clone()}


def _text(held_out: bool, enough: int | None) -> bytes:
    """Text of one split, until there is enough of it."""
    text = bytearray()
    for path in _files():
        if (_chance(path) % 10 == 0) == held_out:
            text += path.read_bytes()
            if enough is not None and len(text) >= enough:
                break
    return bytes(text)


def _files() -> list[Path]:
    """Sources in an order that mixes subjects and is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: (_chance(path), path))


def _chance(path: Path) -> int:
    """A number that depends on the file's name alone."""
    return zlib.crc32(path.name.encode())
