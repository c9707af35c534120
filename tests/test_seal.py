"""Seals: any JSON object comes back, and no byte of a sealed text changes unseen."""

from __future__ import annotations

import json

import pytest
import xxhash
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import StoreError
from sharded_phema.seal import sealed, unsealed

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
objects = st.dictionaries(st.text().filter(lambda key: key != "digest"), values, min_size=1, max_size=4)


def refused(text):
    with pytest.raises(StoreError) as caught:
        unsealed(text, "run/file.json")
    assert caught.value.message.startswith("run/file.json: the record is damaged: ")
    assert caught.value.hint
    return caught.value.message


@examples(60)
@given(objects)
def test_an_object_comes_back_and_its_text_is_one_line_of_json_with_a_digest_at_the_end(data):
    # Oracle: the json library, and the digest of all bytes before it, taken here.
    text = sealed(data)
    assert unsealed(text, "x") == data
    plain = json.loads(text)
    digest = plain.pop("digest")
    assert plain == data
    body, tail = text[: -len(f',"digest":"{digest}"}}\n')], text[-len(f',"digest":"{digest}"}}\n') :]
    assert digest == xxhash.xxh3_128_hexdigest(body)
    assert tail == f',"digest":"{digest}"}}\n'.encode()
    assert text.isascii() and text.count(b"\n") == 1


@examples(150)
@given(objects, st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_is_refused(data, place, change):
    text = bytearray(sealed(data))
    text[place % len(text)] ^= change
    refused(bytes(text))


@examples(60)
@given(objects, st.data())
def test_bytes_that_are_missing_or_too_many_are_refused(data, more):
    text = sealed(data)
    a, b = sorted(more.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    if a < b:
        refused(text[:a] + text[b:])
    extra = more.draw(st.binary(min_size=1, max_size=3))
    if (longer := text[:a] + extra + text[a:]) != text:
        refused(longer)


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"\xff\xfe", b'{"a":1}\n', b'{"a":1,"digest":"0"}\n', b"[" * 99])
def test_what_was_never_sealed_is_refused(text):
    assert "expected it to end in" in refused(text)


def forged(body):
    """A text with the right digest, whatever it says."""
    return body + f',"digest":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


@pytest.mark.parametrize(
    "body", [b"", b"[1", b'{"a":NaN', b'{"a":-Infinity', b'{"a":"\xff"', b'{"a":' + b"[" * 100_000, b"{'a':1"]
)
def test_what_is_no_json_object_is_refused_with_any_digest(body):
    refused(forged(body))
    assert unsealed(forged(b'{"a":1'), "x") == {"a": 1}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_written(number):
    with pytest.raises(ValueError, match="JSON"):
        sealed({"a": number})
