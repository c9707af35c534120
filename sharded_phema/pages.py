"""Pages: host memory for buffers, in huge pages where the system has them."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["zeros_in_huge_pages"]

HUGE = 2 << 20
"""Bytes of a huge page; less than one is left to torch."""


def zeros_in_huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU, in a mapping of its own that goes with it.

    A page costs the system the same when it is first touched whether it holds 4 KiB or 2 MiB: on virtual machines, tens
    of milliseconds for the buffers of one reconstruction.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.zeros(shape, dtype=dtype)
    # Private: processes that are forked later do not share what is written.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
