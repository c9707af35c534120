"""Memory: what a rank holds beyond its model, told by the operating system."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_phema.posthoc import PostHocEMA

MIB = 1 << 20
SIDE, LAYERS = 1024, 24
PARAMETERS = LAYERS * SIDE * SIDE


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    pages = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert pages is not None
    return 1024 * int(pages[1])


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype) for _ in range(LAYERS)))
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return fully_shard(model) if kind == "fsdp2" else model


def memory_body(kind: str, dtype: torch.dtype, root: Path) -> tuple[int, int, int]:
    """Bytes after construction and a first update, after more of them, and after a snapshot; beyond the model."""
    first = PostHocEMA(nn.Linear(4, 4), root / "first")  # whatever is loaded once, whoever uses it
    first.update()
    first.snapshot()
    model = model_of(kind, dtype)
    with torch.no_grad():  # memory is there once it is written to
        for param in model.parameters():
            param.add_(1.0)
    before = resident()
    ema = PostHocEMA(model, root / "run", snapshot_every=1e9)
    ema.update()
    made = resident() - before
    for _ in range(3):
        ema.update()
    updated = resident() - before
    ema.snapshot()
    return made, updated, resident() - before


@pytest.mark.parametrize(
    ("kind", "ranks", "dtype"),
    [
        ("plain", 1, torch.float32),
        ("ddp", 2, torch.float32),
        ("fsdp2", 2, torch.float32),
        ("fsdp2", 2, torch.bfloat16),
        ("ddp", 4, torch.float32),
    ],
)
def test_a_rank_holds_four_bytes_an_average_and_element_of_its_share_and_little_else(tmp_path, kind, ranks, dtype):
    share = 2 * 4 * PARAMETERS // ranks
    for made, updated, stored in run_ranks(ranks, memory_body, kind, dtype, tmp_path):
        # Memory that was freed before the count begins may be used again, one or two MiB of it.
        assert share <= made + 4 * MIB, "the averages are there"
        assert max(made, updated, stored) <= share + 64 * MIB
        assert updated - made <= 8 * MIB


def test_the_measure_sees_a_copy_of_the_model(tmp_path) -> None:
    before = resident()
    copy = torch.ones(PARAMETERS)
    assert resident() - before >= 4 * copy.numel() - MIB
    assert not dist.is_initialized()
