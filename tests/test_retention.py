"""The wish for what is kept: its text, its checks."""

from __future__ import annotations

import math

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import TargetError
from sharded_phema.retention import Retention, parse_retention

targets = st.lists(
    st.sampled_from(["0.12", "0.03:0.25", "decay:linear:0.2", "uniform", "exponential:tau=5,ramp=0.05", "0.1@t=50"]),
    min_size=1,
    max_size=4,
    unique=True,
).map(tuple)
limits = st.one_of(
    st.fixed_dictionaries({"tolerance": st.floats(1e-9, 1e3)}, optional={"earlier": st.floats(1.01, 100.0)}),
    st.fixed_dictionaries({"count": st.integers(1, 10**6)}),
    st.fixed_dictionaries({"bytes": st.integers(1, 10**15)}),
)


@examples(60)
@given(targets, limits)
def test_the_text_reads_back_as_the_same_wish(texts, limit):
    wish = Retention(texts, **limit)
    assert parse_retention(wish.text) == wish


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.03:0.25 tolerance=1e-2", Retention(("0.03:0.25",), tolerance=0.01)),
        ("  0.12   decay:linear:0.2 count=20 ", Retention(("0.12", "decay:linear:0.2"), count=20)),
        ("bytes=10GB 0.12", Retention(("0.12",), bytes=10**10)),
        ("0.12 bytes=2KiB", Retention(("0.12",), bytes=2048)),
        ("power:gamma=5 tolerance=0.1 earlier=2", Retention(("power:gamma=5",), tolerance=0.1, earlier=2.0)),
    ],
)
def test_a_text_is_targets_and_one_limit(text, expected):
    assert parse_retention(text) == expected


def test_ranges_are_nine_widths():
    assert [target.text for target in Retention(("0.03:0.25", "uniform"), count=3).wanted] == [
        *("0.03", "0.0391", "0.05097", "0.06644", "0.0866", "0.1129", "0.1471", "0.1918", "0.25"),
        "uniform",
    ]
    assert Retention((0.12,), count=3).text == "0.12 count=3"
    assert Retention(("0.1",), count=3).earlier == math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.12", "expected one of tolerance, count, bytes, found none"),
        ("0.12 count=3 bytes=5", "found count and bytes"),
        ("0.12 count=3 count=4", "count is given twice"),
        ("0.12 count=0", "count must be a number above 0, found 0"),
        ("0.12 count=2.5", "count must be a number, found '2.5'"),
        ("0.12 tolerance=-1", "tolerance must be a number above 0, found -1"),
        ("0.12 tolerance=nan", "tolerance must be a number above 0, found nan"),
        ("0.12 tolerance=", "tolerance must be a number, found ''"),
        ("0.12 bytes=10XB", "bytes must be a number, found '10XB'"),
        ("0.12 tolerance=0.1 earlier=1", "earlier must be a number above 1, found 1"),
        ("0.12 count=4 earlier=2", "earlier goes with a tolerance alone"),
        ("tolerance=0.1", "no target"),
        ("0.12 0.12 count=3", "'0.12' is asked for twice"),
        ("0.25:0.03 count=3", "expected LOW:HIGH"),
        ("within 1e-2", "expected one of tolerance"),
        ("within count=3", "'within'"),
    ],
)
def test_a_bad_wish_is_refused(text, message):
    with pytest.raises(TargetError, match=message):
        parse_retention(text)


def test_a_wish_in_python_is_checked_alike():
    for known, message in (
        ({"targets": "0.12", "count": 3}, "targets must be a list"),
        ({"targets": ("0.12",), "count": True}, "count must be a number above 0"),
        ({"targets": ("0.12",), "count": 2.5}, "count must be a whole number, found 2.5"),
        ({"targets": (), "count": 2}, "no target"),
    ):
        with pytest.raises(TargetError, match=message):
            Retention(**known)
