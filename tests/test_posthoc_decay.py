"""The decay experiment: its rebuilt averages against recorded weights, its table, and the document's numbers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sharded_phema.rebuild import reconstruct

ROOT = Path(__file__).parents[1]
DOCUMENT, FIGURE = ROOT / "docs" / "posthoc_decay.md", ROOT / "docs" / "figures" / "posthoc_decay.png"
STEPS, TURN = 40, 32


@pytest.fixture
def example(monkeypatch):
    """The example as a module; what it imports lies beside it, as where torchrun starts it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import posthoc_decay

    yield posthoc_decay
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(ROOT / "examples")):
            del sys.modules[name]


def test_decays_are_rebuilt_within_their_forecast_and_stand_beside_real_ones(example, tmp_path) -> None:
    options = example.Options(tmp_path / "run", STEPS, 16, 1, 16, 4, 1e-2, 32)
    experiment = example.Experiment(options, torch.device("cpu"))
    walked: dict[int, dict[str, torch.Tensor]] = {}

    def record(step: int) -> None:
        walked.setdefault(step, {n: p.detach().double() for n, p in experiment.model.named_parameters()})

    found = example.run(experiment, record)
    shapes = {"linear": lambda u: u, "cosine": lambda u: 0.5 * (1 - math.cos(math.pi * u))}
    plan = reconstruct(tmp_path / "run" / "ema", [f"decay:{shape}:0.2" for shape in shapes], out=tmp_path / "out")
    for (shape, share), target in zip(shapes.items(), plan.targets, strict=True):
        # Oracle: the mean of the weights after each step, with what the rate falls by in that step for weights.
        falls = {step: share((step - TURN) / 8) - share((step - 1 - TURN) / 8) for step in range(TURN + 1, STEPS + 1)}
        assert sum(falls.values()) == pytest.approx(1)
        rebuilt = load_file(tmp_path / "out" / f"decay-{shape}-0.2" / "model.safetensors")
        error = distance = 0.0
        for name, tensor in rebuilt.items():
            expected = sum(weight * walked[step][name] for step, weight in falls.items())
            error += float((tensor.double() - expected).square().sum())
            distance += float((walked[STEPS][name] - expected).square().sum())
        # The forecast is that of an expectation: a factor of 3 either way is what real trainings keep to.
        assert math.sqrt(error / distance) < 3 * target.fit.forecast < 0.3
    check_record(example, found)
    assert not any(torch.equal(walked[STEPS][name], walked[TURN][name]) for name in walked[STEPS])


def check_record(example, record: dict) -> None:
    rows = {row["weights"]: row["loss"] for row in record["rows"]}
    assert len(rows) == 3 + 2 + len(example.WIDTHS)
    assert all(math.isfinite(loss) and loss > 0 for loss in rows.values())
    assert [len(curve) for curve in record["curves"].values()] == [9, 8, 8]
    constant, linear, cosine = record["curves"].values()
    assert {step for step, _ in linear} == {step for step, _ in cosine} < {step for step, _ in constant}
    assert rows["constant rate, raw weights"] == constant[-1][1]
    assert linear[-1][1] != cosine[-1][1] != constant[-1][1]


def test_the_decayed_runs_begin_where_the_constant_one_turned(example, tmp_path) -> None:
    """With a rate that does not fall, the second run is the first one again, to the last bit."""
    options = example.Options(tmp_path / "run", STEPS, 16, 1, 16, 4, 1e-2, 32)
    experiment = example.Experiment(options, torch.device("cpu"))
    constant = example.constant_run(experiment)
    example.SHAPES["none"] = lambda u: 1.0
    assert example.decayed_run(experiment, "none") == constant[1:]


def test_the_numbers_of_the_document_are_those_of_the_run(example) -> None:
    record = json.loads(FIGURE.with_suffix(".json").read_text())
    text = DOCUMENT.read_text()
    assert example.table(record) in text
    assert f"{record['parameters'] / 1e6:.2f} M parameters" in text
    assert FIGURE.name in text and 10_000 < FIGURE.stat().st_size < 200_000
