"""Progress of long work: a bar on a terminal, a line every tenth of the way elsewhere, nothing on other ranks."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items one by one; on rank 0 stderr shows how far the caller has come."""
    if dist.get_rank() != 0:
        return iter(items)
    if sys.stderr.isatty():
        return iter(track(items, description=label, console=Console(stderr=True)))
    return _with_lines(items, label)


def _with_lines(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items with a printed line at about every tenth of them."""
    for done, item in enumerate(items, start=1):
        yield item
        if done * 10 // len(items) > (done - 1) * 10 // len(items):
            print(f"{label}: {done}/{len(items)}", file=sys.stderr, flush=True)
