"""The numbers of docs/choosing.md, computed again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sharded_phema.fit import fit
from sharded_phema.profile import Exponential, Power
from sharded_phema.target import parse_target
from sharded_phema.width import MAX_SIGMA_REL, gamma_of

PAGE = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text()


def table(first):
    """Rows of the table whose header begins with a cell, without header and rule."""
    lines = iter(PAGE.splitlines())
    assert any(line.startswith(f"| {first} |") for line in lines), first
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def rounds_to(text, value):
    """Whether a printed number is the value to the digits printed."""
    digits = text.replace(",", "").removesuffix(" %")
    places = len(digits.partition(".")[2])
    return float(digits) == pytest.approx(value, abs=0.5000001 * 10.0**-places)


@pytest.mark.parametrize("row", table("decay per step"), ids=lambda row: row[0])
def test_what_a_constant_decay_is_in_other_terms(row):
    # Oracle: the definitions; the standard deviation of the age of an exponential average is its time constant.
    decay, tau = float(row[0]), -1.0 / math.log(float(row[0]))
    assert rounds_to(row[1], 1.0 / (1.0 - decay))
    assert rounds_to(row[2], tau * math.log(2.0))
    for text, steps in zip(row[3:], (1e4, 1e5, 1e6), strict=True):
        if text == "too long":
            assert tau / steps > MAX_SIGMA_REL
        else:
            assert float(text) == pytest.approx(tau / steps, rel=0.006)


@pytest.mark.parametrize("row", table("sigma_rel"), ids=lambda row: row[0])
def test_what_a_relative_width_is_in_other_terms(row):
    sigma_rel, gamma = float(row[0]), gamma_of(float(row[0]))
    assert rounds_to(row[1], gamma)
    share = float(row[2].removesuffix(" %")) / 100.0
    assert Power(gamma, 1.0).cumulative(1.0 - share) == pytest.approx(0.5, abs=0.012)
    tau = sigma_rel * 1e5
    assert rounds_to(row[3], math.exp(-1.0 / tau))
    assert rounds_to(row[4], 1.0 / -math.expm1(-1.0 / tau))
    assert rounds_to(row[5], tau * math.log(2.0))


def test_a_decay_per_step_in_samples():
    # A decay of 0.9999 a step of 256 samples, as the page spells it.
    tau = -256 / math.log(0.9999)
    for spelling in ("exponential:tau=2559872", "exponential:halflife=1774368"):
        assert f"`{spelling}`" in PAGE
        assert parse_target(spelling).amount == pytest.approx(tau, rel=1e-6)


def test_the_first_tenth_of_training_weighs_next_to_nothing():
    assert Power(gamma_of(0.10), 1.0).cumulative(0.1) == pytest.approx(1e-8, rel=0.2)
    assert Exponential(1.0, 10.0 * math.log(2.0)).cumulative(0.0) == pytest.approx(2.0**-10)


def test_the_warm_up_of_tensorflow_is_the_ramp_that_the_page_says():
    # Oracle: the product of its decays over steps 50 to 5000, against a ramped average begun there.
    kept = math.prod((1 + n) / (10 + n) for n in range(51, 5001))
    ramped = parse_target("exponential:tau=1e9,ramp=0.077").profile(5000.0)
    assert math.log(ramped.cumulative(50.0)) == pytest.approx(math.log(kept), rel=0.03)


@pytest.mark.parametrize("row", table("tracked"), ids=lambda row: row[0])
def test_what_pairs_of_tracked_averages_rebuild(row):
    tracked = [parse_target(text.strip()) for text in row[0].split(",")]
    wanted = ["0.03", "0.06", "0.12", "0.20", "0.25", "decay:linear:0.2"]
    sources = [target.profile(i / 32) for i in range(1, 33) for target in tracked]
    found = fit(sources, [parse_target(text).profile(1.0) for text in wanted])
    for text, one in zip(row[1:], found, strict=False):
        assert float(text) == pytest.approx(one.forecast, rel=0.06, abs=1e-12)
    assert float(row[-1]) == pytest.approx(found[0].noise_gain, rel=0.1)
