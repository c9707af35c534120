"""Records and their text: what comes back is what was written, and what is no such record is refused."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import fields, is_dataclass

import pytest
import xxhash
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import StoreError
from sharded_phema.layout import Box
from sharded_phema.manifest import (
    VERSION,
    ClaimRecord,
    Cut,
    FrozenRecord,
    LayoutRecord,
    Parameter,
    Part,
    RawTensor,
    RunRecord,
    SessionRecord,
    SnapshotRecord,
)
from sharded_phema.seal import sealed, unsealed
from sharded_phema.transcript import decode, encode

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
sessions = st.builds(
    SessionRecord,
    st.text(),
    st.text(),
    st.text(),
    finite,
    counts,
    st.text(),
    frozen_from=st.text(),
    frozen_numbers=sizes,
)
digests = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(b"".join)
numbers = st.lists(finite, max_size=3).map(tuple)
held = st.lists(st.lists(boxes, max_size=3).map(tuple), max_size=3).map(tuple)
cuts = st.lists(st.builds(Cut, counts, sizes, sizes, held), max_size=2).map(tuple)
layouts = st.builds(LayoutRecord, st.text(), counts, cuts, cuts, cuts)
parts = st.lists(st.builds(Part, counts, digests, counts), max_size=3).map(tuple)
snapshots = st.builds(
    SnapshotRecord, st.text(), st.text(), counts, finite, finite, parts, numbers, numbers, frozen_mark=st.text()
)
frozen = st.builds(FrozenRecord, st.text(), st.text(), counts, counts, counts, digests)
claims = st.builds(ClaimRecord, st.text(), counts, st.text(), counts, st.text())
records = st.one_of(runs, sessions, layouts, snapshots, frozen, claims)
KINDS = (RunRecord, SessionRecord, LayoutRecord, SnapshotRecord, FrozenRecord, ClaimRecord)

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
SESSION = SessionRecord("r", "s", "", 2.5, 4, "l")
SNAPSHOT = SnapshotRecord("r", "s", 3, 40.0, 1.0, (Part(128, bytes(range(16)), 1),))
FROZEN = FrozenRecord("r", "s", 1, 0, 8)


def bits(value):
    """A record as plain data in which floats are their bytes, so that -0.0 is not 0.0."""
    if is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [bits(item) for item in value]
    return struct.pack("d", value) if isinstance(value, float) else value


def data_of(record):
    return unsealed(encode(record), "x")


def refuse(kind, data):
    """Decode data that is no such record, sealed as one would be, and give the message."""
    with pytest.raises(StoreError) as caught:
        decode(kind, data if isinstance(data, bytes) else resealed(data), "folder/file.json")
    assert caught.value.message.startswith("folder/file.json: ")
    assert caught.value.hint
    return caught.value.message


def resealed(data):
    """The text of any data with the right digest; JSON's own infinities are let through."""
    body = json.dumps(data, separators=(",", ":")).encode().removesuffix(b"}")
    return body + f',"digest":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


@examples(120)
@given(records)
def test_a_record_comes_back_to_the_last_bit(record):
    text = encode(record)
    found = decode(type(record), text, "x")
    assert type(found) is type(record)
    assert bits(found) == bits(record)
    assert encode(found) == text


@examples(50)
@given(records)
def test_a_record_is_ascii_json_that_says_what_it_is(record):
    data = data_of(record)
    assert encode(record).isascii()
    assert data["format"] == f"sharded_phema {type(record).__name__}"
    assert data["version"] == VERSION


def test_a_whole_number_is_a_time_and_comes_back_as_a_float():
    found = decode(SessionRecord, sealed(data_of(SESSION) | {"resumed_at": 7}), "x")
    assert found.resumed_at == 7.0
    assert isinstance(found.resumed_at, float)


@pytest.mark.parametrize("version", [0, VERSION + 1, -1, "1", None, [1], {}])
def test_another_version_is_refused_and_named(version):
    message = refuse(SnapshotRecord, data_of(SNAPSHOT) | {"version": version})
    assert f"version {VERSION}" in message
    assert repr(version) in message


@examples(30)
@given(records, st.sampled_from(KINDS))
def test_a_record_is_refused_as_any_other_kind(record, kind):
    if kind is not type(record):
        assert f"expected a {kind.__name__} of version" in refuse(kind, encode(record))


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
        assert re.search("needs exactly|is not a number|expected it to end", refuse(type(record), plain | {key: value}))


def nested(depth):
    """Lists in lists."""
    return [nested(depth - 1)] if depth else []


def cut_data(**changes):
    return {"dim": 0, "edges": [], "ranks": [], "boxes": []} | changes


@pytest.mark.parametrize(
    ("record", "key", "value", "text"),
    [
        (SNAPSHOT, "snapshot", 1.0, "snapshot must be int"),
        (SNAPSHOT, "snapshot", True, "snapshot must be int"),
        (SNAPSHOT, "snapshot", "1", "snapshot must be int"),
        (SNAPSHOT, "snapshot", None, "snapshot must be int"),
        (SNAPSHOT, "snapshot", -1, "snapshot must not be negative"),
        (SNAPSHOT, "parts", [{"size": -128, "digests": "", "frozen": 0}], "size must not be negative"),
        (SNAPSHOT, "parts", [{"size": 128, "digests": 7, "frozen": 0}], "digests must be a text of a multiple of 32"),
        (SNAPSHOT, "parts", [{"size": 128}], "parts needs exactly"),
        (SNAPSHOT, "parts", {}, "parts must be a list"),
        (SNAPSHOT, "norms", ["1"], "norms must be float"),
        (SNAPSHOT, "t", "40", "t must be float"),
        (SNAPSHOT, "t", False, "t must be float"),
        (SNAPSHOT, "t", [40.0], "t must be float"),
        (SNAPSHOT, "run", 7, "run must be str"),
        (SNAPSHOT, "run", {"a": 1}, "run must be str"),
        (RunRecord("r", "steps", (), ()), "averages", "0.05", "averages must be a list"),
        (RunRecord("r", "steps", (), ()), "averages", [0.05], "averages must be str"),
        (RunRecord("r", "steps", (), ()), "parameters", [["w", [2]]], "parameters needs exactly"),
        (RunRecord("r", "steps", (), ()), "parameters", [{"name": "w"}], "parameters needs exactly"),
        (RunRecord("r", "steps", (), ()), "parameters", [{"name": "w", "shape": [-2]}], "shape must not be negative"),
        (RunRecord("r", "steps", (), ()), "parameters", [{"name": "w", "shape": [True]}], "shape must be int"),
        (RunRecord("r", "steps", (), ()), "copied", [{"name": "w", "shape": []}], "copied needs exactly"),
        (LayoutRecord("r", 1, ()), "averaged", [{"offsets": [], "sizes": []}], "averaged needs exactly"),
        (LayoutRecord("r", 1, ()), "averaged", [cut_data(edges=[0, -1])], "edges must not be negative"),
        (LayoutRecord("r", 1, ()), "averaged", [cut_data(edges=[0, 2.0])], "edges must be int"),
        (LayoutRecord("r", 1, ()), "averaged", [cut_data(boxes=[[{"offsets": [0], "sizes": 1}]])], "must be a list"),
        (FROZEN, "digests", ["0" * 32], "digests must be a text"),
        (FROZEN, "digests", "0" * 31, "digests must be a text"),
        (FROZEN, "digests", "0" * 48, "digests must be a text"),
        (FROZEN, "digests", "g" * 32, "digests must be a text"),
        (FROZEN, "digests", "A" * 32, "digests must be a text"),
        (FROZEN, "digests", "0 " * 32, "digests must be a text"),
        (FROZEN, "digests", "\u0660" * 32, "digests must be a text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_placed(record, key, value, text):
    assert text in refuse(type(record), data_of(record) | {key: value})


@pytest.mark.parametrize("number", [10**400, math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused(number):
    refuse(SnapshotRecord, data_of(SNAPSHOT) | {"t": number})
    refuse(SnapshotRecord, data_of(SNAPSHOT) | {"norms": [1.0, number]})


def test_nan_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        encode(SessionRecord("r", "s", "", float("nan"), 1, "l"))


@pytest.mark.parametrize(
    "data",
    [{}, {"format": []}, {"format": "x", "version": 1}, {"version": 1}, {"format": "sharded_phema RunRecord"},
     {"format": "sharded_phema SnapshotRecord", "version": 1, "run": nested(90)}],
)  # fmt: skip
def test_what_is_no_record_of_ours_is_refused_although_it_is_sealed(data):
    for kind in KINDS:
        refuse(kind, data)


@pytest.mark.parametrize("text", [b"", b" ", b"{}", b"null", encode(SNAPSHOT)[:-10], encode(SNAPSHOT) + b"x"])
def test_what_is_not_sealed_is_refused(text):
    for kind in KINDS:
        assert "the record is damaged" in refuse(kind, text)


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
    read_or_refused(type(record), resealed(plain))


@examples(120)
@given(records, st.integers(0, 10**6), st.integers(0, 3), st.binary(max_size=3))
def test_a_mutated_text_is_refused(record, place, removed, inserted):
    text = encode(record)
    place %= len(text)
    mutated = text[:place] + inserted + text[place + removed :]
    if mutated != text:
        refuse(type(record), mutated)


@examples(80)
@given(st.sampled_from(KINDS), st.dictionaries(st.text(max_size=5), anything))
def test_random_sealed_data_is_refused(kind, data):
    refuse(kind, data)


@examples(40)
@given(st.sampled_from(KINDS), st.binary(max_size=60))
def test_random_bytes_are_refused(kind, text):
    refuse(kind, text)


def read_or_refused(kind, text):
    try:
        found = decode(kind, text, "x")
    except StoreError:
        return
    assert type(found) is kind
    assert bits(decode(kind, encode(found), "x")) == bits(found)
