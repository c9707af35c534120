"""Memory in huge pages: zeros of any shape and dtype that are one's own, and go when nobody holds them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from sharded_phema import pages
from sharded_phema.pages import HUGE, zeros_in_huge_pages


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (3, 7), (2, 1 << 10, 300), (1 << 21,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_contiguous_tensor_of_zeros_that_can_be_written(shape, dtype) -> None:
    found = zeros_in_huge_pages(*shape, dtype=dtype)
    assert (found.shape, found.dtype, found.is_contiguous()) == (shape, dtype, True)
    assert not found.any()
    found.fill_(1.5)
    other = zeros_in_huge_pages(*shape, dtype=dtype)
    assert not other.any() and bool((found == 1.5).all())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_the_memory_goes_with_the_last_view_of_it() -> None:
    held = zeros_in_huge_pages(64 << 20, dtype=torch.float32).fill_(1.0)
    view, before = held[5:], resident()
    del held
    assert bool((view == 1.0).all())
    del view
    assert before - resident() > 200 << 20


def test_what_a_forked_process_writes_is_its_own() -> None:
    found = zeros_in_huge_pages(HUGE, dtype=torch.float32)
    child = os.fork()
    if not child:
        found.numpy()[:] = 1.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not found.any()


def test_a_system_without_huge_pages_will_do(monkeypatch) -> None:
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE")
    assert not zeros_in_huge_pages(HUGE, dtype=torch.float32).any()
