"""accelerate: updates at real steps alone, and averages that come back from its checkpoints, in each of its modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import ACCUMULATED, Loop, accelerator_of
from builders import tensors_of
from ranks import run_ranks
from test_attach import assert_same_averages
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

from sharded_phema.errors import OrderError, StoreError
from sharded_phema.integrations.accelerate import prepare_ema
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

WIDTHS = (0.05, 0.10)
MODES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
SAVED, END = 2 * ACCUMULATED, 4 * ACCUMULATED


def trained_body(root: Path) -> None:
    for mode in MODES:
        with accelerator_of(mode) as accelerator:
            whole = trained(accelerator, mode, root / mode)
        with accelerator_of(mode) as accelerator:
            loop = Loop(accelerator, mode)
            # The run's own folder, which holds a snapshot of the time of the checkpoint and later ones.
            ema = prepare_ema(accelerator, loop.model, root / mode / "run", WIDTHS, 2)
            accelerator.load_state(str(root / mode / "checkpoint"))
            assert ema.t == 2
            for number in range(SAVED, END):
                loop.micro_batch(number)
                ema.update()
            assert_same_averages(ema.ema, whole)
            ema.close()


def trained(accelerator: Any, mode: str, root: Path) -> PostHocEMA:
    """Trains and saves on the way; its averages are those of updates by hand."""
    loop = Loop(accelerator, mode)
    ema = prepare_ema(accelerator, loop.model, root / "run", WIDTHS, 2)
    samples = prepare_ema(accelerator, loop.model, root / "samples", WIDTHS, 1e9, "samples", folder="samples")
    by_hand = PostHocEMA(loop.model, root / "by_hand", WIDTHS, 1e9)
    in_samples = PostHocEMA(loop.model, root / "in_samples", WIDTHS, 1e9, "samples")
    for number in range(END):
        loop.micro_batch(number)
        ema.update()
        samples.update(8 * (number + 1))
        if number % ACCUMULATED == ACCUMULATED - 1:
            by_hand.update()
            in_samples.update(8 * (number + 1))
        if number + 1 == SAVED:
            accelerator.save_state(str(root / "checkpoint"))
    accelerator.wait_for_everyone()  # save_state does not
    assert ema.t == END // ACCUMULATED
    assert_same_averages(ema.ema, by_hand)
    assert_same_averages(samples.ema, in_samples)
    ema.close()
    return ema.ema


def elsewhere_body(root: Path) -> None:
    for mode in ("ddp", "fsdp2"):
        with accelerator_of(mode) as accelerator:
            loop = Loop(accelerator, mode)
            ema = prepare_ema(accelerator, loop.model, root / mode / "run3", WIDTHS, 1e9)
            accelerator.load_state(str(root / mode / "checkpoint"))
            accelerator.save_state(str(root / mode / "again"))
            ema.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("accelerate")
    run_ranks(2, trained_body, root, timeout=200)
    return root


@pytest.mark.parametrize("mode", MODES)
def test_updates_are_those_of_real_steps_and_a_resumed_run_is_the_same(checkpoints: Path, mode: str) -> None:
    # The comparisons are made by the ranks; every rank writes its own part of the state.
    parts = list((checkpoints / mode / "checkpoint" / "ema").rglob("*.safetensors"))
    assert len(parts) == 2


def test_on_another_number_of_ranks(checkpoints: Path, tmp_path: Path) -> None:
    run_ranks(3, elsewhere_body, checkpoints)
    for mode in ("ddp", "fsdp2"):
        rebuilt = []
        for name in ("checkpoint", "again"):
            out = tmp_path / mode / name
            reconstruct(checkpoints / mode / name / "ema" / "000001", WIDTHS, out=out)
            rebuilt.append({width: tensors_of(out / str(width)) for width in ("0.05", "0.1")})
        for width in rebuilt[0]:
            first, second = (found[width] for found in rebuilt)
            assert first.keys() == second.keys() and len(first) == 8
            assert all(torch.equal(first[name], second[name]) for name in first)


def alone_body(root: Path) -> None:
    with accelerator_of("ddp") as accelerator:
        accelerator.gradient_accumulation_steps = 1
        # As mixed_precision="fp16" makes one on a GPU.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        model = nn.Linear(4, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        ema = prepare_ema(accelerator, model, root / "run", WIDTHS, 1e9)
        for step in range(5):
            accelerator.backward(model(torch.ones(2, 4) * (torch.inf if step in (1, 3) else 1.0)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        assert ema.t == 3
        with pytest.raises(OrderError, match="go into 'ema' of its checkpoints already"):
            prepare_ema(accelerator, model, root / "other", WIDTHS)
        ema.close()
        accelerator.save_state(str(root / "without"))
        assert not (root / "without" / "ema").exists()
        prepare_ema(accelerator, model, root / "later", WIDTHS)
        with pytest.raises(StoreError, match=r"expected averages in 'ema', found none.*\nhint: .* after load_state"):
            accelerator.load_state(str(root / "without"))


def test_skipped_steps_and_checkpoints_without_averages(tmp_path: Path) -> None:
    run_ranks(1, alone_body, tmp_path)
