"""Averages: what an update costs beyond its arithmetic, and what it notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from allocations import Allocations
from builders import no_flush
from torch import nn

from sharded_phema.averages import WATCHED
from sharded_phema.errors import OrderError, TargetError
from sharded_phema.posthoc import PostHocEMA


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def model_of(count: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """So many tensors, each of a size of its own, at most 1 MiB together."""
    return nn.ParameterList([nn.Parameter(torch.randn(100 + i % 7).to(dtype)) for i in range(count)])


def instructions(act: Callable[[], object]) -> int:
    """How many bytecodes something takes, in whatever function: loops count, whether they call anything or not."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def settled(model: nn.Module, root: Any, **options: Any) -> PostHocEMA:
    ema = PostHocEMA(model, root, snapshot_every=1e9, **options)
    for _ in range(3):
        ema.update()
    return ema


@pytest.mark.parametrize("kernel", ["auto", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_takes_as_many_instructions_of_python_for_many_tensors_as_for_few(tmp_path, kernel, dtype) -> None:
    counts = [
        instructions(settled(model_of(n, dtype), tmp_path / str(n), kernel=kernel).update) for n in (10, 100, 1500)
    ]
    assert counts[0] == counts[1] == counts[2] > 0


def test_the_count_sees_a_loop(tmp_path) -> None:
    few, many = (settled(model_of(n), tmp_path / str(n), kernel="reference").update for n in (10, 20))
    assert instructions(many) - instructions(few) > 10 * 10


@pytest.mark.parametrize("kernel", ["auto", "foreach"])
def test_an_update_allocates_no_tensor(tmp_path, kernel) -> None:
    ema = settled(model_of(50), tmp_path, kernel=kernel)
    with Allocations() as seen:
        ema.update()
    assert seen.elements == 0


def test_storage_that_was_replaced_everywhere_is_noticed_at_the_next_update(tmp_path) -> None:
    model = model_of(50)
    ema = settled(model, tmp_path)
    kept = ema._averages.layout(0)[0].local.clone()
    model.to(torch.bfloat16)
    with pytest.raises(OrderError, match="the model's storage was replaced after the averages were made"):
        ema.update()
    assert torch.equal(ema._averages.layout(0)[0].local, kept), "nothing was averaged"


@pytest.mark.parametrize("index", [0, 23, 49])
def test_storage_of_one_tensor_is_noticed_when_its_turn_comes(tmp_path, index) -> None:
    model = model_of(50)
    ema = settled(model, tmp_path)
    model[index].data = torch.zeros_like(model[index])
    with pytest.raises(OrderError, match=f"^{index}: the model's storage was replaced"):
        for _ in range(-(-50 // WATCHED) + 1):
            ema.update()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_tensors_have_their_turns_too(tmp_path, count) -> None:
    settled(model_of(count), tmp_path / "run")


def test_a_kernel_is_chosen_by_name_and_gives_what_any_other_gives(tmp_path) -> None:
    found = []
    for kernel in ("reference", "foreach", "auto"):
        torch.manual_seed(0)
        ema = settled(model_of(4), tmp_path / kernel, kernel=kernel)
        found.append([shard.local for shard in ema._averages.layout(1)])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=3 * torch.finfo(torch.float32).eps, atol=1e-7)
    with pytest.raises(TargetError, match="expected one of auto, reference"):
        PostHocEMA(model_of(1), tmp_path / "none", kernel="fastest")


# Parameters that are not finite.


def guarded(model: nn.Module, root: Any, **options: Any) -> PostHocEMA:
    return PostHocEMA(model, root, snapshot_every=1e9, non_finite="skip", **options)


def values(ema: PostHocEMA) -> list[torch.Tensor]:
    return [shard.local.clone() for index in range(2) for shard in ema._averages.layout(index)]


@pytest.mark.parametrize("kernel", ["reference", "foreach", "auto"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_skipped_updates_leave_the_averages_of_a_run_that_did_not_make_them(tmp_path, kernel, odd) -> None:
    # Oracle: the same run that calls update at the other times only; its weights follow from the true times.
    torch.manual_seed(0)
    model = model_of(5)
    ema, other = (make(model, tmp_path / make.__name__, kernel=kernel) for make in (guarded, plain))
    bad = {1, 2, 6, 9, 10, 11, 20}
    for t in range(1, 26):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape))
            kept = model[3][7].clone()
            if t in bad:
                model[3][7] = odd
        ema.update(t)
        if t not in bad:
            other.update(t)
        with torch.no_grad():
            model[3][7] = kept
    assert ema.skipped == len(bad)
    for found, expected in zip(values(ema), values(other), strict=True):
        # A share of two updates is put together on the device in float64, and rounded once as any other.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def plain(model: nn.Module, root: Any, **options: Any) -> PostHocEMA:
    return PostHocEMA(model, root, snapshot_every=1e9, **options)


@pytest.mark.parametrize("kernel", ["foreach", "auto"])
def test_a_guard_that_has_nothing_to_do_changes_no_bit(tmp_path, kernel) -> None:
    model = model_of(5)
    emas = [make(model, tmp_path / make.__name__, kernel=kernel) for make in (guarded, plain)]
    for _ in range(20):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape))
        for ema in emas:
            ema.update()
    assert emas[0].skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(*map(values, emas), strict=True))


def test_skipped_updates_are_told_at_the_next_snapshot_once(tmp_path, caplog) -> None:
    model = model_of(3)
    ema = guarded(model, tmp_path)
    ema.update()
    with torch.no_grad():
        kept = model[0][0].item()
        model[0][0] = torch.nan
    for _ in range(4):
        ema.update()
    with torch.no_grad():
        model[0][0] = kept
    ema.update()
    assert "skipped" not in caplog.text
    ema.snapshot()
    assert "4 updates were skipped on this rank" in caplog.text
    caplog.clear()
    ema.update()
    ema.snapshot()
    assert "skipped" not in caplog.text
    assert ema.skipped == 4


def test_a_run_of_nothing_but_nan_is_never_stored_nor_swapped_in(tmp_path) -> None:
    model = model_of(3)
    with torch.no_grad():
        model[1][2] = torch.nan
    ema = guarded(model, tmp_path)
    ema.update()
    for act in (ema.snapshot, ema.state_dict, ema.swapped(0.05).__enter__):
        with pytest.raises(OrderError, match="no finite weights were averaged yet"):
            act()
    with torch.no_grad():
        model[1].zero_()
    ema.update()
    assert all(torch.equal(a, p) for a, p in zip(values(ema), [*model.parameters()] * 2, strict=True))
    ema.close()


def test_a_guard_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(TargetError, match='expected "average" or "skip"'):
        PostHocEMA(model_of(1), tmp_path, non_finite="ignore")


def test_guarded_updates_take_no_more_python_for_many_tensors(tmp_path) -> None:
    counts = []
    for n in (10, 1000):
        ema = guarded(model_of(n), tmp_path / str(n))
        ema.update()
        counts.append(instructions(ema.update))
    assert counts[0] == counts[1]
