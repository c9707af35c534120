from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.profile import Decay, Exponential, Power, Ramped, Uniform
from sharded_phema.target import parse_target, parse_targets
from sharded_phema.width import gamma_of

above_0 = st.floats(1e-9, 1e30)
bodies = st.one_of(
    st.floats(1e-4, 0.2886).map(repr),
    st.floats(0.0, 1e6).map("power:gamma={!r}".format),
    above_0.map("exponential:tau={!r}".format),
    above_0.map("exponential:halflife={!r}".format),
    st.floats(1e-9, 1.0, exclude_max=True).map("exponential:decay={!r}".format),
    st.tuples(above_0, st.floats(1e-6, 0.69)).map(lambda x: f"exponential:tau={x[0]},ramp={x[1]}"),
    above_0.map("exponential:tau={!r},corrected".format),
    st.tuples(above_0, above_0).map(lambda x: f"exponential:tau={x[0]},start={x[1]},corrected"),
    st.just("uniform"),
    above_0.map("uniform:start={!r}".format),
    st.floats(1e-6, 1.0).map("window:{!r}".format),
    st.tuples(st.sampled_from(["linear", "cosine", "sqrt"]), st.floats(1e-6, 1.0)).map(
        lambda x: f"decay:{x[0]}:{x[1]}"
    ),
)
texts = st.tuples(bodies, st.one_of(st.just(""), above_0.map("@t={!r}".format))).map("".join)


@given(texts)
def test_the_canonical_text_parses_to_the_same_target(text):
    target = parse_target(text)
    assert parse_target(target.text) == target
    assert parse_target(target.text).text == target.text


@given(texts, texts)
def test_a_slug_is_a_file_name_and_tells_targets_apart(first, second):
    a, b = parse_target(first), parse_target(second)
    assert re.fullmatch(r"[A-Za-z0-9.-]+", a.slug)
    assert (a.slug == b.slug) == (a.text == b.text)


@pytest.mark.parametrize(
    ("given_text", "text", "slug"),
    [
        (0.12, "0.12", "0.12"),
        (np.float64(0.12), "0.12", "0.12"),
        (" .120 ", "0.12", "0.12"),
        ("0.12@t=5000.0", "0.12@t=5000", "0.12-t-5000"),
        ("power:gamma=5.0", "power:gamma=5", "power-gamma-5"),
        ("exponential:tau=2e3", "exponential:tau=2000", "exponential-tau-2000"),
        ("exponential:halflife=1,ramp=.05", "exponential:tau=1.4426950408889634,ramp=0.05", None),
        ("exponential:decay=0.5,corrected", "exponential:tau=1.4426950408889634,corrected", None),
        (
            "exponential:tau=5,start=1e3,corrected",
            "exponential:tau=5,corrected,start=1000",
            "exponential-tau-5-corrected-start-1000",
        ),
        ("uniform", "uniform", "uniform"),
        ("uniform:start=0", "uniform", "uniform"),
        ("uniform:start=7.5e4@t=1e5", "uniform:start=75000@t=100000", "uniform-start-75000-t-100000"),
        ("window:1", "window:1", "window-1"),
        ("decay:linear:.2@t=1e22", "decay:linear:0.2@t=1e22", "decay-linear-0.2-t-1e22"),
    ],
)
def test_spellings_have_one_canonical_form(given_text, text, slug):
    target = parse_target(given_text)
    assert target.text == text
    assert slug in (None, target.slug)


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ("0.12", Power(gamma_of(0.12), 8000.0, 100.0)),
        ("power:gamma=0", Power(0.0, 8000.0, 100.0)),
        ("exponential:tau=50", Exponential(50.0, 8000.0, 100.0)),
        ("exponential:halflife=50", Exponential(50.0 / math.log(2.0), 8000.0, 100.0)),
        ("exponential:decay=0.9", Exponential(-1.0 / math.log(0.9), 8000.0, 100.0)),
        ("exponential:tau=50,ramp=0.05", Ramped(50.0, 0.05, 8000.0, 100.0)),
        ("exponential:tau=50,corrected", Exponential(50.0, 8000.0, 0.0, corrected=True)),
        ("exponential:tau=50,corrected,start=200", Exponential(50.0, 8000.0, 200.0, corrected=True)),
        ("exponential:tau=50,corrected,start=50", Exponential(50.0, 8000.0, 100.0, corrected=True)),
        ("uniform", Power(0.0, 8000.0, 100.0)),
        ("uniform:start=2000", Uniform(2000.0, 8000.0)),
        ("uniform:start=50", Uniform(100.0, 8000.0)),
        ("window:0.25", Uniform(6000.0, 8000.0)),
        ("window:1", Uniform(100.0, 8000.0)),
        ("decay:sqrt:0.5", Decay("sqrt", 4000.0, 8000.0)),
        ("decay:cosine:1", Decay("cosine", 100.0, 8000.0)),
        ("window:0.25@t=4000", Uniform(3000.0, 4000.0)),
        ("0.12@t=4000", Power(gamma_of(0.12), 4000.0, 100.0)),
    ],
)
def test_a_target_has_the_profile_that_its_text_says(text, profile):
    # Oracle: the profile written out; the run averaged from 100 on and is read at 8000.
    assert parse_target(text).profile(8000.0, start=100.0) == profile


@pytest.mark.parametrize(
    "text", ["uniform:start=9000", "exponential:tau=50,corrected,start=9000", "uniform:start=8000"]
)
def test_before_its_start_an_average_is_the_weights_as_they_are(text):
    profile = parse_target(text).profile(8000.0, start=100.0)
    assert profile.cumulative(np.array([7999.9, 8000.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("text", ["window:0.2", "decay:linear:0.2", "0.1@t=50", "uniform@t=50"])
def test_what_no_running_average_follows_cannot_be_tracked(text):
    with pytest.raises(TargetError, match="cannot be tracked") as caught:
        parse_target(text).tracked(100.0, 1.0)
    assert "rebuild it after training" in caught.value.hint


def test_the_time_is_the_one_in_the_text():
    assert parse_target("0.12").time is None
    assert parse_target("0.12@t=5000").time == 5000.0


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("powr:gamma=3", "target 'powr:gamma=3': unknown kind 'powr'", "did you mean power? understood are 0.12"),
        ("windo", "'windo' is neither a width nor a kind", "did you mean window?"),
        ("", "'' is neither a width nor a kind", "understood are 0.12"),
        ("@t=3", "'' is neither a width nor a kind", "understood are 0.12"),
        ("nan", "'nan' is neither a width nor a kind", "understood are 0.12"),
        ("0.12:3", "unknown kind '0.12'", "understood are 0.12"),
        ("power:5", "power needs gamma=NUMBER, found '5'", "power:gamma=6.94"),
        ("power", "power needs gamma=NUMBER, found ''", "power:gamma=6.94"),
        ("power:gamma=-1", "gamma must be a number at least 0, found -1.0", "understood are"),
        ("exponential:tau=0", "tau must be a number above 0, found 0.0", "understood are"),
        ("exponential:5", "needs tau=NUMBER or halflife=NUMBER or decay=NUMBER, found '5'", "exponential:decay=0.9999"),
        ("exponential:decay=1", "the decay must be above 0 and below 1, found 1.0", "give halflife=TIME"),
        ("exponential:decay=9999", "the decay must be above 0 and below 1, found 9999.0", "give halflife=TIME"),
        ("exponential:halflife=-5", "tau must be a number above 0, found -7.2", "understood are"),
        ("exponential:tau=5,warmup", "'warmup' is no option", ",ramp=0.05 or ,corrected"),
        ("exponential:tau=5,ramp=x", "'ramp=x' is no option", ",ramp=0.05 or ,corrected"),
        ("exponential:tau=5,ramp=0.9", "ramp must be a number above 0 and at most 0.693 (ln 2), found 0.9", "5 %"),
        ("exponential:tau=5,ramp=0.1,ramp=0.1", "ramp is given twice", ",ramp=0.05"),
        ("exponential:tau=5,ramp=0.1,corrected", "a ramped average has nothing to correct", "leave out"),
        ("exponential:tau=5,start=5", "start needs corrected", "add ,corrected"),
        ("exponential:tau=5,corrected,start=-5", "start must be a number at least 0, found -5.0", "training time"),
        ("uniform:0.2", "uniform needs start=NUMBER, found '0.2'", "window:0.2"),
        ("uniform:start=-1", "start must be a number at least 0, found -1.0", "training time"),
        ("power:gamma=5,corrected", "power needs a number, found '5,corrected'", "understood are"),
        ("0.2887", "sigma_rel must be a number above 0 and below 0.2886, found 0.2887", "try a width"),
        (0, "target 0: sigma_rel must be a number above 0 and below 0.2886, found 0.0", "try a width"),
        ("window:inf", "window needs a number, found 'inf'", "window:0.2"),
        ("window:0", "the fraction must be above 0 and at most 1, found 0.0", "0.2 is the last 20 %"),
        ("window:1.5@t=9", "the fraction must be above 0 and at most 1, found 1.5", "0.2 is the last 20 %"),
        ("decay:liner:0.2", "unknown shape 'liner'", "did you mean decay:linear:0.2?"),
        ("decay:linear", "decay needs a number, found ''", "decay:linear:0.2"),
        ("0.12@t=-5", "the time must be @t=NUMBER above 0, found '@t=-5'", "0.12@t=50000"),
        ("0.12@5", "the time must be @t=NUMBER above 0, found '@5'", "0.12@t=50000"),
        ("0.12@t=nan", "the time must be @t=NUMBER above 0, found '@t=nan'", "0.12@t=50000"),
        (True, "target True: neither a text nor a number", "understood are"),
        (None, "target None: neither a text nor a number", "understood are"),
    ],
)
def test_a_text_that_is_no_target_is_refused_with_a_mend(text, message, hint):
    with pytest.raises(TargetError) as caught:
        parse_target(text)
    assert message in caught.value.message
    assert repr(text) in caught.value.message
    assert hint in caught.value.hint


def test_targets_keep_their_order():
    assert [target.text for target in parse_targets(["0.2", 0.1, "window:0.5"])] == ["0.2", "0.1", "window:0.5"]


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ([], "no target: at least one is expected"),
        (["0.1", "0.2", 0.10], "target '0.1' is asked for twice"),
        ("0.1", "target '0.1': one text where a list is expected"),
    ],
)
def test_a_list_that_is_empty_or_repeats_is_refused(several, message):
    with pytest.raises(TargetError) as caught:
        parse_targets(several)
    assert caught.value.message == message
    assert caught.value.hint
