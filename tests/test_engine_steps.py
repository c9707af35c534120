"""DeepSpeed's own loop: ``update`` after every ``engine.step()`` counts the steps that changed weights, no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, make_model
from ranks import run_ranks
from test_attach import assert_same_averages
from torch import nn
from zero_engines import Recipe, engine_of

from sharded_phema.backends import backend_of
from sharded_phema.errors import UnsupportedModel
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.world import gather

pytest.importorskip("deepspeed")

BF16, ACCUMULATED = torch.bfloat16, 3
CONFIG = {"gradient_accumulation_steps": ACCUMULATED}
RECIPES = {
    "1": Recipe(1, "DeepSpeedZeroOptimizer", BF16, config=CONFIG),
    "2": Recipe(2, "DeepSpeedZeroOptimizer", BF16, config=CONFIG),
    "3": Recipe(3, "DeepSpeedZeroOptimizer_Stage3", BF16, config=CONFIG),
}
OVERFLOWING = (2, 4)
"""Steps of the engine, from 0, at which the loss is infinite: in bfloat16 DeepSpeed finds that and skips them."""
SAMPLES = 6 * 2 * ACCUMULATED


def ema_of(model: Any, root: Path, **options: Any) -> PostHocEMA:
    return PostHocEMA(model, root, (0.05, 0.10), 1e9, **options)


def micro_batch(engine: Any, number: int) -> None:
    """A forward, a backward and a call of ``step``."""
    loss = engine(inputs(number, BF16)).float().square().mean()
    engine.backward(loss * (torch.inf if number // ACCUMULATED in OVERFLOWING else 1.0))
    engine.step()


def body(root: Path) -> None:
    for name, recipe in RECIPES.items():
        with engine_of(recipe) as engine:
            assert engine.zero_optimization_stage() == recipe.stage
            counted(engine, root / name)


def counted(engine: Any, root: Path) -> None:
    steps, samples = ema_of(engine, root / "steps"), ema_of(engine, root / "samples", unit="samples")
    # The oracles: a pair of module and optimizer does not count, so that each of its updates is one.
    pair = {"model": engine.module, "optimizer": engine.optimizer}
    by_hand, in_samples = ema_of(root=root / "a", **pair), ema_of(root=root / "b", unit="samples", **pair)
    assert backend_of(*pair.values()).steps(*pair.values()) is None
    resumed = None
    for number in range(6 * ACCUMULATED):
        masters = weights(by_hand)
        micro_batch(engine, number)
        steps.update()
        samples.update(engine.global_samples)
        really = number % ACCUMULATED == ACCUMULATED - 1 and number // ACCUMULATED not in OVERFLOWING
        # An all but empty rank may keep nothing of what changed.
        assert any(gather(not torch.equal(masters, weights(by_hand)))) == really
        if really:
            by_hand.update()
            in_samples.update((number + 1) // ACCUMULATED * SAMPLES)
        assert steps.t == by_hand.t and samples.t == in_samples.t
        if number == 10:  # within gradient accumulation: what went before is not counted again
            resumed = ema_of(engine, root / "resumed")
            resumed.load_state_dict(steps.state_dict())
        elif resumed:
            resumed.update()
    assert engine.skipped_steps == len(OVERFLOWING) and steps.t == 4 and samples.t == 6 * SAMPLES
    assert gather(backend_of(engine).steps(engine, None)) == [4, 4]
    assert resumed is not None
    for found, expected in ((steps, by_hand), (samples, in_samples), (resumed, steps)):
        assert_same_averages(found, expected)
    with pytest.raises(UnsupportedModel, match=r"an engine that steps its optimizer itself.*\nhint: call ema.update"):
        steps.attach(engine.optimizer)
    with pytest.raises(UnsupportedModel, match="found DeepSpeedZeroOptimizer"):
        by_hand.attach(engine.optimizer)


def weights(ema: PostHocEMA) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(shard.current().flatten() for shard in ema._layout)])


def test_within_accumulation_and_at_overflows_nothing_is_counted(tmp_path: Path) -> None:
    run_ranks(2, body, tmp_path)


def test_other_models_leave_the_counting_to_their_loop(tmp_path: Path) -> None:
    for model in (make_model(), nn.Linear(2, 3)):
        assert backend_of(model).steps(model, None) is None
    ema = ema_of(make_model(), tmp_path)
    ema.update()
    ema.update()
    assert ema.t == 2
