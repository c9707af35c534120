"""Files of scores: what is appended is read again, a cut tail costs one line, other damage is named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from builders import examples, no_flush
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import OutputError, StoreError
from sharded_phema.scores import Score, Second, append_score, read_scores

SCORE = Score("r1", "steps", "m:f", "0.12", 100.0, 1.5, 1e-3, 2.0, sigma_rel=0.12)
FULL = Score(
    *("r1", "steps", "m:f", "window:0.2", 100.0, -3.0, 0.0, 0.5),
    **{"group": "*.attn.*", "base": "0.12", "second": Second("guidance", 2.0), "repeat": 2},
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1)
scores = st.builds(
    Score,
    **{"run": names, "unit": names, "metric": names, "score": numbers},
    target=st.sampled_from(["0.12", "uniform", "decay:linear:0.2", "exponential:tau=5,ramp=0.05"]),
    t=st.floats(1e-300, 1e300),
    **{name: st.floats(0, 1e300) for name in ("forecast", "seconds")},
    sigma_rel=st.none() | st.floats(1e-9, 1),
    **{"group": st.none() | names, "base": st.none() | names, "repeat": st.integers(0, 10**9)},
    second=st.none() | st.builds(Second, names, numbers),
)


@given(found=st.lists(scores, max_size=4))
@examples(40)
def test_what_is_appended_is_read_again_in_order(tmp_path_factory, found) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    path.touch()
    with no_flush():
        for score in found:
            append_score(path, score)
    assert read_scores(path) == tuple(found)
    assert len(path.read_bytes().splitlines()) == len(found)


def test_a_line_is_the_json_that_was_agreed_on(tmp_path) -> None:
    append_score(tmp_path / "s", FULL)
    assert json.loads((tmp_path / "s").read_text()) == {
        **{"version": 1, "run": "r1", "unit": "steps", "metric": "m:f", "target": "window:0.2", "t": 100.0},
        **{"sigma_rel": None, "group": "*.attn.*", "base": "0.12", "second": {"name": "guidance", "value": 2.0}},
        **{"repeat": 2, "score": -3.0, "forecast": 0.0, "seconds": 0.5},
    }


def test_numbers_of_numpy_and_whole_numbers_are_taken(tmp_path) -> None:
    score = Score("r", "steps", "m", "0.12", 100, np.float32(0.5), np.float64(0.25), 0, second=Second("n", np.int64(3)))
    append_score(tmp_path / "s", score)
    assert read_scores(tmp_path / "s") == (score,)


def test_wherever_a_write_was_cut_the_lines_before_are_read_and_the_next_is_appended_whole(tmp_path) -> None:
    path = tmp_path / "s"
    for score in (SCORE, FULL):
        append_score(path, score)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    with no_flush():
        for stop in range(len(whole) + 1):
            path.write_bytes(whole[:stop])
            # A line without its end counts once it is a whole object.
            left = (SCORE, FULL)[: (stop >= first - 1) + (stop >= len(whole) - 1)]
            assert read_scores(path) == left
            if stop % 7 == 0 or abs(stop - first) < 3 or stop > len(whole) - 3:
                append_score(path, FULL)
                assert read_scores(path) == (*left, FULL)


def test_a_long_torn_tail_is_cut_off(tmp_path) -> None:
    path = tmp_path / "s"
    append_score(path, SCORE)
    with path.open("ab") as file:
        file.write(b'{"metric": "' + b"x" * 20_000 + b"\xff\x00")
    assert read_scores(path) == (SCORE,)
    append_score(path, FULL)
    assert read_scores(path) == (SCORE, FULL)


LINE = json.loads('{"version": 1, "run": "r", "unit": "steps", "metric": "m", "target": "0.12", "t": 1.0, '
    '"sigma_rel": 0.12, "group": null, "base": null, "second": null, "repeat": 0, "score": 1.0, "forecast": 0.0, '
    '"seconds": 0.0}')  # fmt: skip


def damaged(**changes: object) -> bytes:
    return json.dumps({k: v for k, v in (LINE | changes).items() if v is not ...}).encode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"version": 1, "ru', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1]", "expected an object, found list"),
        (damaged(version=2), "expected version 1, found 2"),
        (damaged(version=...), "expected version 1, found None"),
        (damaged(version=True), "expected version 1, found True"),
        (damaged(score=...), "lacks score"),
        (damaged(extra=1), "has the unknown extra"),
        (damaged(score=math.nan), "score must be a finite number, found nan"),
        (damaged(score="1"), "score must be a finite number, found '1'"),
        (damaged(score=True), "score must be a finite number, found True"),
        (damaged(t=0), "t must be a finite number above 0, found 0"),
        (damaged(sigma_rel=-0.1), "sigma_rel must be a finite number above 0"),
        (damaged(forecast=-1), "forecast must be a finite number of at least 0"),
        (damaged(repeat=-1), "repeat must be a whole number from 0, found -1"),
        (damaged(repeat=1.0), "repeat must be a whole number"),
        (damaged(metric=""), "metric must be a text"),
        (damaged(group=3), "group must be a text, found 3"),
        (damaged(target="wondow:0.2"), "unknown kind 'wondow'"),
        (damaged(target="0.120"), "'0.120' is not the canonical spelling"),
        (damaged(target="0.12@t=5"), "is not the canonical spelling without a time"),
        (damaged(second={"name": "g"}), "lacks value"),
        (damaged(second={"name": "g", "value": None}), "second.value must be a finite number, found None"),
        (damaged(second="g=2"), "second must be a name and a value, or null"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, line, said) -> None:
    path = tmp_path / "s"
    append_score(path, SCORE)
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(LINE).encode() + b"\n")
    with pytest.raises(StoreError) as error:
        read_scores(path)
    assert f"{path}, line 2: " in error.value.message and said in error.value.message and error.value.hint


def test_a_score_that_cannot_be_is_refused_before_it_is_written() -> None:
    with pytest.raises(StoreError, match="score must be a finite number, found inf") as error:
        Score("r", "steps", "m", "0.12", 1.0, math.inf, 0.0, 0.0)
    assert "a metric must return a finite number" in error.value.hint


def test_a_file_that_is_not_there_and_one_that_cannot_be_written_are_errors(tmp_path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        read_scores(tmp_path / "none")
    with pytest.raises(OutputError, match="cannot be written"):
        append_score(tmp_path / "none" / "s", SCORE)


def test_the_key_tells_apart_all_but_what_came_out() -> None:
    again = Score(**{name: getattr(FULL, name) for name in FULL.__slots__} | {"score": 9.0, "seconds": 9.0})
    assert again.key == FULL.key != SCORE.key
