"""The fuzz target takes what is right, and anything else; ``make fuzz`` looks much longer, guided by coverage."""

from __future__ import annotations

import random

import pytest
import untrusted
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.errors import StoreError


def test_every_seed_is_read_without_an_error() -> None:
    """What the fuzzer begins from reaches the depths of each reader."""
    for seed in untrusted.seeds():
        reader = untrusted.READERS[seed[0]]
        if reader in (untrusted.records, untrusted.runs, untrusted.targets, untrusted.messages):
            reader(seed[1:])
        untrusted.take(seed)


def test_each_seed_with_some_bytes_changed_gives_nothing_but_errors_of_ours() -> None:
    chance = random.Random(3)
    for seed in untrusted.seeds():
        for _ in range(4):
            text = bytearray(seed)
            for _ in range(chance.randrange(1, 4)):
                place = chance.randrange(1, len(text) + 1)
                text[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            untrusted.take(bytes(text))


@examples(200)
@given(st.integers(0, len(untrusted.READERS) - 1), st.binary(max_size=200))
def test_any_bytes_give_nothing_but_errors_of_ours(reader: int, data: bytes) -> None:
    untrusted.take(bytes([reader]) + data)


def test_the_watch_sees_what_lies_outside() -> None:
    with untrusted.outside_is_forbidden() as root, pytest.raises(AssertionError, match="outside of"):
        (root / "out" / "secret").read_text()
    with pytest.raises(AssertionError, match="bytes for an input of 3"), untrusted.justified(3):
        bytearray(200 << 20)
    with pytest.raises(StoreError):
        untrusted.texts(b"\0{}")
