"""Costs: how long a reconstruction takes, from the size of the model and the speeds of the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stopwatch import timed

__all__ = ["Cost", "multiplied", "predicted"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a reconstruction moves, and the seconds of it.

    Attributes:
        bytes_read: Of stored averages, over all workers.
        bytes_written: Of outputs, over all workers.
        read_s: Seconds of reading them.
        sum_s: Seconds of the products; they overlap with reading.
        write_s: Seconds of writing.
        seconds: All of it, planning included.
    """

    bytes_read: float
    bytes_written: float
    read_s: float
    sum_s: float
    write_s: float
    seconds: float


def predicted(
    parameters: float,
    sources: int,
    targets: int,
    workers: int,
    *,
    read_gbps: float,
    write_gbps: float,
    gflops: float,
    shared_read_gbps: float = math.inf,
    shared_write_gbps: float = math.inf,
    stored_bytes: int = 2,
    written_bytes: int = 2,
    planning_s: float = 0.0,
) -> Cost:
    """Seconds of a reconstruction: planning, then reading or summing, whichever takes longer, and writing.

    Args:
        parameters: Of the model.
        sources: Stored averages that the plan reads, of all that there are: `--dry-run` tells.
        targets: Averages that are rebuilt.
        workers: Processes.
        read_gbps: What one worker reads alone, in 1e9 bytes a second.
        write_gbps: What one worker writes alone, flushed.
        gflops: Products and sums of one worker, in 1e9 of both a second.
        shared_read_gbps: What storage gives to all workers together.
        shared_write_gbps: What it takes from them.
        stored_bytes: Of one number in a snapshot.
        written_bytes: Of one number in the output.
        planning_s: Of planning, and of what else does not depend on the model's size.
    """
    bytes_read, bytes_written = parameters * sources * stored_bytes, parameters * targets * written_bytes
    read_s = bytes_read / 1e9 / min(workers * read_gbps, shared_read_gbps)
    write_s = bytes_written / 1e9 / min(workers * write_gbps, shared_write_gbps)
    sum_s = 2.0 * parameters * sources * targets / 1e9 / (workers * gflops)
    return Cost(bytes_read, bytes_written, read_s, sum_s, write_s, planning_s + max(read_s, sum_s) + write_s)


def multiplied(sources: int, targets: int) -> float:
    """1e9 products and sums a second of blocks in float32 by coefficients, on one thread of this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks, weights = torch.randn(sources, 1 << 16), torch.randn(targets, sources)
    out = torch.empty(targets, 1 << 16)
    best = min(timed(lambda: torch.mm(weights, blocks, out=out)) for _ in range(20))
    torch.set_num_threads(before)
    return 2.0 * blocks.numel() * targets / 1e9 / best
