"""Attached to an optimizer: each step that it makes is an update, of the time that it took, and no other call is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from models import Trainer, make_model, shard
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_phema.errors import OrderError, TargetError, UnsupportedModel
from sharded_phema.posthoc import PostHocEMA

WIDTHS = (0.05, 0.10)


def ema_of(model: nn.Module, root: Path, **options: object) -> PostHocEMA:
    return PostHocEMA(model, root, WIDTHS, 1e9, **options)  # type: ignore[arg-type]


def assert_same_averages(found: PostHocEMA, expected: PostHocEMA) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and found.t == expected.t
    for label in a:
        for name, value in b[label].items():
            local, other = (x.pieces.values() if hasattr(x, "pieces") else (x,) for x in (a[label][name], value))
            assert all(torch.equal(x, y) for x, y in zip(local, other, strict=True)), (label, name)


@pytest.mark.parametrize("advance", [None, 48, "growing"])
def test_every_step_is_an_update_of_the_time_it_took(tmp_path: Path, advance: object) -> None:
    trainer, seen = Trainer(make_model()), 0.0
    attached, by_hand = ema_of(trainer.model, tmp_path / "a"), ema_of(trainer.model, tmp_path / "b")
    asked = (lambda: 16.0 * trainer.done) if advance == "growing" else advance
    handle = attached.attach(trainer.optimizer, asked)  # type: ignore[arg-type]
    for _ in range(5):
        trainer.step()
        seen += 16.0 * trainer.done if advance == "growing" else advance or 1  # type: ignore[operator]
        by_hand.update(seen)
    assert attached.t == seen
    assert_same_averages(attached, by_hand)
    handle.remove()
    trainer.step()
    assert attached.t == seen, "removed"
    attached.attach(trainer.optimizer).remove()


def test_removing_twice_and_closing_are_harmless(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path)
    handle = ema.attach(trainer.optimizer)
    trainer.step()
    ema.close()
    trainer.step()  # a closed run is not updated
    handle.remove()
    handle.remove()
    assert ema.t == 1


def overflowing(fused: bool) -> tuple[nn.Linear, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), scaler


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_updates(tmp_path: Path, fused: bool) -> None:
    # A fused optimizer is called by the scaler even then, and looks for itself.
    model, optimizer, scaler = overflowing(fused)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
    attached, by_hand = ema_of(model, tmp_path / "a"), ema_of(model, tmp_path / "b")
    attached.attach(optimizer, 8)
    made = 0
    for step in range(6):
        before = model.weight.detach().clone()
        loss = model(torch.ones(3, 4) * (float("inf") if step in (1, 4) else step + 1.0)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not torch.equal(before, model.weight):
            made += 1
            by_hand.update(8 * made)
    assert made == 4 and attached.t == 32
    assert_same_averages(attached, by_hand)


def test_a_second_attachment_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path)
    ema.attach(trainer.optimizer)
    other = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(OrderError, match=r"attached to an optimizer already.*\nhint: of several optimizers"):
        ema.attach(other)
    trainer.step()
    assert ema.t == 1


def test_of_two_optimizers_the_last_one_tells(tmp_path: Path) -> None:
    model = make_model()
    parts = [list(model.first.parameters()), [p for n, p in model.named_parameters() if not n.startswith("first")]]
    optimizers = [torch.optim.SGD(part, lr=0.05) for part in parts]
    attached, by_hand = ema_of(model, tmp_path / "a"), ema_of(model, tmp_path / "b")
    attached.attach(optimizers[-1])
    for _ in range(4):
        model(torch.ones(2, 5)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        by_hand.update()
    assert_same_averages(attached, by_hand)


class Wrapper(torch.optim.Optimizer):
    """As accelerate wraps: of torch's class, without its hooks."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


class Foreign:
    """As DeepSpeed's ZeRO optimizers: none of torch's, with one of torch's inside that steps piece by piece."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_wrappers_of_torchs_class_are_seen_through(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path)
    ema.attach(Wrapper(Wrapper(trainer.optimizer)))
    trainer.step()
    assert ema.t == 1


def test_what_calls_no_hook_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path)
    itself = Wrapper(None)
    itself.optimizer = itself
    each = [torch.optim.SGD([param], lr=0.1) for param in trainer.model.parameters()]
    for optimizer, name in [
        (Foreign(trainer.optimizer), "Foreign"),
        (Wrapper(Foreign(trainer.optimizer)), "Foreign"),
        (itself, "Wrapper"),
        (each, "list"),
        (None, "NoneType"),
    ]:
        with pytest.raises(UnsupportedModel, match=rf"found {name}, which calls no hook.*\nhint: call ema.update\(\)"):
            ema.attach(optimizer)


@pytest.mark.parametrize("advance", [0, -1, True, "8", float("nan")])
def test_an_advance_that_is_none_is_refused(tmp_path: Path, advance: object) -> None:
    trainer = Trainer(make_model())
    with pytest.raises(TargetError, match="advance must be a number above 0"):
        ema_of(trainer.model, tmp_path).attach(trainer.optimizer, advance)  # type: ignore[arg-type]


def test_a_function_that_does_not_advance_is_told_at_the_step(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema_of(trainer.model, tmp_path).attach(trainer.optimizer, lambda: 0.0)
    with pytest.raises(OrderError, match="it must be later than the last one"):
        trainer.step()


def test_a_step_inside_of_a_swap_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    ema = ema_of(trainer.model, tmp_path)
    ema.attach(trainer.optimizer)
    trainer.step()
    with ema.swapped(sigma_rel=0.10), pytest.raises(OrderError, match="update: the weights are swapped"):
        trainer.step()


def test_slow_updates_beside_the_training_see_their_own_step(tmp_path: Path) -> None:
    trainer = Trainer(make_model())
    by_hand, attached = ema_of(trainer.model, tmp_path / "a"), ema_of(trainer.model, tmp_path / "b", overlap=True)
    attached.attach(trainer.optimizer)
    move = attached._averages._move

    class Late:
        """The update, late: a step that did not wait for it would be seen."""

        def __call__(self, weights: tuple[float, ...]) -> None:
            time.sleep(0.02)
            move(weights)

        def __getattr__(self, name: str) -> object:
            return getattr(move, name)

    attached._averages._move = Late()  # type: ignore[assignment]
    for _ in range(5):
        trainer.step()
        by_hand.update()
    assert_same_averages(attached, by_hand)
    attached.close()


def sharded_body(root: Path) -> None:
    model = shard(make_model())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    trainer = Trainer(model)
    attached, by_hand = ema_of(model, root / "a"), ema_of(model, root / "b")
    attached.attach(trainer.optimizer, 12)
    for step in range(1, 5):
        trainer.step()
        by_hand.update(12 * step)
    assert_same_averages(attached, by_hand)
    attached.close()


def test_sharded_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, sharded_body, tmp_path)
