from __future__ import annotations

import json
import re
import struct
from dataclasses import fields, is_dataclass

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box
from sharded_phema.manifest import (
    VERSION,
    FrozenRecord,
    LayoutRecord,
    Parameter,
    PartRecord,
    RawTensor,
    RunRecord,
    SessionRecord,
    decode,
    encode,
)

counts = st.integers(0, 10**30)
finite = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.lists(counts, max_size=4).map(tuple)
boxes = sizes.flatmap(
    lambda offsets: st.builds(
        Box, st.just(offsets), st.lists(counts, min_size=len(offsets), max_size=len(offsets)).map(tuple)
    )
)
raw = st.lists(st.builds(RawTensor, st.text(), sizes, st.text(), st.text()), max_size=3).map(tuple)
runs = st.builds(
    RunRecord,
    st.text(),
    st.text(),
    st.lists(st.text(), max_size=3).map(tuple),
    st.lists(st.builds(Parameter, st.text(), sizes), max_size=4).map(tuple),
    raw,
    raw,
    dtype=st.text(),
)
sessions = st.builds(SessionRecord, st.text(), st.text(), st.text(), finite, counts, st.text(), sizes)
held = st.lists(st.lists(boxes, max_size=3).map(tuple), max_size=3).map(tuple)
layouts = st.builds(LayoutRecord, st.text(), st.text(), counts, held, held, held, sizes)
parts = st.builds(PartRecord, st.text(), st.text(), counts, counts, finite, finite, counts, frozen=counts)
frozen = st.builds(FrozenRecord, st.text(), st.text(), counts, counts, counts, sizes)
records = st.one_of(runs, sessions, layouts, parts, frozen)
KINDS = (RunRecord, SessionRecord, LayoutRecord, PartRecord, FrozenRecord)

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
SESSION = SessionRecord("r", "s", "", 2.5, 4)
PART = PartRecord("r", "s", 3, 1, 40.0, 1.0, 128)


def bits(value):
    """A record as plain data in which floats are their bytes, so that -0.0 is not 0.0."""
    if is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [bits(item) for item in value]
    return struct.pack("d", value) if isinstance(value, float) else value


def data_of(record):
    return json.loads(encode(record))


def refuse(kind, data):
    """Decode data that is no such record, and give the message."""
    with pytest.raises(StoreError) as caught:
        decode(kind, data if isinstance(data, str | bytes) else json.dumps(data), "folder/file.json")
    assert caught.value.message.startswith("folder/file.json: ")
    assert caught.value.hint
    return caught.value.message


@examples(120)
@given(records)
def test_a_record_comes_back_to_the_last_bit(record):
    text = encode(record)
    for found in (decode(type(record), text, "x"), decode(type(record), text.encode(), "x")):
        assert type(found) is type(record)
        assert bits(found) == bits(record)


@examples(50)
@given(records)
def test_a_record_is_ascii_json_that_says_what_it_is(record):
    data = data_of(record)
    assert encode(record).isascii()
    assert data["format"] == f"sharded_phema {type(record).__name__}"
    assert data["version"] == VERSION


def test_a_whole_number_is_a_time_and_comes_back_as_a_float():
    found = decode(SessionRecord, json.dumps(data_of(SESSION) | {"resumed_at": 7}), "x")
    assert found.resumed_at == 7.0
    assert isinstance(found.resumed_at, float)


@pytest.mark.parametrize("version", [0, VERSION + 1, -1, "1", None, [1], {}])
def test_another_version_is_refused_and_named(version):
    message = refuse(PartRecord, data_of(PART) | {"version": version})
    assert f"version {VERSION}" in message
    assert repr(version) in message


@examples(30)
@given(records, st.sampled_from(KINDS))
def test_a_record_is_refused_as_any_other_kind(record, kind):
    if kind is not type(record):
        assert kind.__name__ in refuse(kind, encode(record))


@examples(60)
@given(records, st.data())
def test_a_missing_key_is_refused(record, data):
    plain = data_of(record)
    del plain[data.draw(st.sampled_from(sorted(plain)))]
    refuse(type(record), plain)


@examples(30)
@given(records, st.text().filter(bool), anything)
def test_an_extra_key_is_refused(record, key, value):
    plain = data_of(record)
    if key not in plain:
        # Infinities and NaN are refused for themselves before keys are looked at.
        assert re.search("needs exactly|is not a number", refuse(type(record), plain | {key: value}))


@pytest.mark.parametrize(
    ("record", "key", "value", "text"),
    [
        (PART, "rank", 1.0, "rank must be int"),
        (PART, "rank", True, "rank must be int"),
        (PART, "rank", "1", "rank must be int"),
        (PART, "rank", None, "rank must be int"),
        (PART, "rank", -1, "rank must not be negative"),
        (PART, "size", -128, "size must not be negative"),
        (PART, "t", "40", "t must be float"),
        (PART, "t", False, "t must be float"),
        (PART, "t", [40.0], "t must be float"),
        (PART, "run", 7, "run must be str"),
        (PART, "run", {"a": 1}, "run must be str"),
        (RunRecord("r", "steps", (), ()), "averages", "0.05", "averages must be a list"),
        (RunRecord("r", "steps", (), ()), "averages", [0.05], "averages must be str"),
        (RunRecord("r", "steps", (), ()), "parameters", [["w", [2]]], "parameters needs exactly"),
        (RunRecord("r", "steps", (), ()), "parameters", [{"name": "w"}], "parameters needs exactly"),
        (RunRecord("r", "steps", (), ()), "parameters", [{"name": "w", "shape": [-2]}], "shape must not be negative"),
        (LayoutRecord("r", "s", 0, ()), "boxes", [{"offsets": [], "sizes": []}], "boxes must be a list"),
        (RunRecord("r", "steps", (), ()), "copied", [{"name": "w", "shape": []}], "copied needs exactly"),
        (FrozenRecord("r", "s", 1, 0, 8, ()), "marks", [-1], "marks must not be negative"),
        (LayoutRecord("r", "s", 0, ()), "boxes", [[{"offsets": [0], "sizes": 1}]], "sizes must be a list"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_placed(record, key, value, text):
    assert text in refuse(type(record), data_of(record) | {key: value})


def test_a_whole_number_too_large_for_a_float_is_refused():
    refuse(PartRecord, encode(PART).replace("40.0", "9" * 400))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused(number):
    refuse(PartRecord, encode(PART).replace("40.0", number))


def test_nan_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        encode(SessionRecord("r", "s", "", float("nan"), 1))


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "[]", "3", '"text"', "null", "{}", "not json", encode(PART)[:-10], encode(PART) + "x",
        b"\xff\xfe\x00", b"\x80", "[" * 100_000, '{"format":' * 100_000, "9" * 5000,
        '{"format": "sharded_phema PartRecord", "version": 1, "run": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_json_object_of_ours_is_refused(text):
    for kind in KINDS:
        refuse(kind, text)


@examples(120)
@given(records, st.data())
def test_a_record_with_any_value_replaced_is_read_or_refused(record, data):
    # Oracle: decode gives a record of the kind or a StoreError; any other exception fails the test.
    plain = data_of(record)
    place = plain
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(anything)
    read_or_refused(type(record), json.dumps(plain))


@examples(120)
@given(records, st.integers(0, 10**6), st.integers(0, 3), st.text('{}[]",:0129.eE-\\ trueN\u0660\x00', max_size=3))
def test_a_mutated_text_is_read_or_refused(record, place, removed, inserted):
    text = encode(record)
    place %= len(text)
    read_or_refused(type(record), text[:place] + inserted + text[place + removed :])


@examples(80)
@given(st.sampled_from(KINDS), st.one_of(anything.map(json.dumps), st.text(), st.binary(max_size=60)))
def test_random_json_text_and_bytes_are_refused(kind, text):
    refuse(kind, text)


def read_or_refused(kind, text):
    try:
        found = decode(kind, text, "x")
    except StoreError:
        return
    assert type(found) is kind
    assert bits(decode(kind, encode(found), "x")) == bits(found)
