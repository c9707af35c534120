"""Pictures, compared by the data that they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sharded_phema import plot
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.profile import Power
from sharded_phema.store import open_run
from sharded_phema.target import parse_targets
from sharded_phema.width import gamma_of


@pytest.fixture
def run(tmp_path):
    model = nn.Linear(2, 2)
    with PostHocEMA(model, tmp_path / "ema", snapshot_every=10) as ema, torch.no_grad():
        for _ in range(80):
            model.weight += 1
            ema.update()
    return open_run(tmp_path / "ema")


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, out: figures.append(figure))
    return figures


def test_a_rebuilt_profile_lies_on_the_wanted_one_and_weighs_1(run, drawn, tmp_path) -> None:
    plot.draw_profiles(run, parse_targets(["0.12"]), tmp_path / "p.png")
    rebuilt = drawn[0].axes[1]
    wanted, found = (patch.get_data() for patch in rebuilt.patches)
    # Oracle: increments of the profile itself, on the edges of the picture; averaging began with the first step.
    expected = np.diff(Power(gamma_of(0.12), 80.0, 1.0).cumulative(wanted.edges)) / np.diff(wanted.edges)
    np.testing.assert_allclose(wanted.values, expected, rtol=1e-12)
    assert float(found.values @ np.diff(found.edges)) == pytest.approx(1.0, abs=1e-9)
    # Eight snapshots rebuild this width to 3e-3 of |raw - target|; densities are a noisier view of the same.
    assert np.abs(found.values - wanted.values).max() < 0.2 * wanted.values.max()


def test_the_forecast_falls_to_nothing_at_stored_widths_only(run, drawn, tmp_path) -> None:
    plot.draw_forecast(run, tmp_path / "f.png")
    axes = drawn[0].axes[0]
    line, *marks = axes.lines
    assert sorted(round(float(mark.get_xdata()[0]), 6) for mark in marks) == [0.05, 0.1]
    widths, errors = (np.asarray(data) for data in line.get_data())
    assert np.all(np.diff(widths) > 0) and np.all(errors > 0) and errors[0] > 0.1
    assert errors[np.abs(widths - 0.07).argmin()] < 1e-2
