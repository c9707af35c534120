"""Fuzzing: bytes that a coverage-guided fuzzer makes up, given to whatever reads a run folder. Run by ``make fuzz``.

Arguments are libFuzzer's, such as ``-max_total_time=180``, then folders of inputs; a failing input is left beside them.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["sharded_phema"]):
    import untrusted
    from test_damage import places

TOKENS = (
    *("run", "session", "snapshot", "t", "start", "parts", "size", "digests", "frozen", "norms", "gaps", "frozen_mark"),
    *("format", "version", "parent", "resumed_at", "world_size", "layout", "frozen_from", "frozen_numbers", "averaged"),
    *("dim", "edges", "ranks", "boxes", "offsets", "sizes", "name", "shape", "dtype", "kind", "copied", "unit"),
    *("__metadata__", "data_offsets", "averages", "parameters", "F32", "BF16", "float32", "true", "null", "1e999"),
    *("99999999999999999999", "-1", "[]", "{}", "../", "..", "0" * 32, "exponential:", "ramp=", "@t=", "window:"),
)


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        2**31,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        ".",
        "../../etc/passwd",
        "/etc/passwd",
        "\0",
    ),
    *("a/b", "float16", "float64", "bool", "buffer", "0" * 32, "f" * 64, [], {}, [0], [[]], [0, 1], [1, 0], [2**40]),
)


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time JSON stays JSON, so that what lies behind the parser is reached; else bytes change."""
    chance = random.Random(seed)
    begin = data.find(b"{")
    if begin >= 0 and chance.random() < 0.5:
        try:
            # The seal, which ends a record, is not there; a header of tensors has numbers behind it.
            value, length = json.JSONDecoder().raw_decode(data[begin:].decode("latin-1") + "}")
        except (ValueError, RecursionError):
            return bytes(atheris.Mutate(data, max_size))
        end = begin + length
        for _ in range(chance.randint(1, 3)):
            _changed(value, chance)
        text = json.dumps(value, separators=(",", ":")).encode("latin-1")
        if end > len(data):
            return (data[:begin] + text[:-1])[:max_size]
        head = data[: begin - 8] + len(text).to_bytes(8, "little") if begin >= 8 else data[:begin]
        return (head + text + data[end:])[:max_size]
    return bytes(atheris.Mutate(data, max_size))


def _changed(value: Any, chance: random.Random) -> None:
    """Put something else in one place, take it away, or put there what stands in another place."""
    if found := places(value):
        holder, key = chance.choice(found)
        kind = chance.randrange(4)
        if kind == 0 and isinstance(holder[key], int | float):
            holder[key] = holder[key] + chance.choice((-1, 1, 0.5))
        elif kind <= 1:
            holder[key] = chance.choice(ODD)
        elif kind == 2:
            other, place = chance.choice(found)
            holder[key] = json.loads(json.dumps(other[place]))
        elif isinstance(holder, list):
            holder.pop(key)
        else:
            holder.pop(key, None)


def main() -> None:
    """Fuzz until libFuzzer's arguments say that it is enough."""
    with tempfile.TemporaryDirectory() as place:
        corpus, words = Path(place, "corpus"), Path(place, "words")
        corpus.mkdir()
        for number, seed in enumerate(untrusted.seeds()):
            (corpus / f"{number:04d}").write_bytes(seed)
        words.write_text("".join(f'"{token}"\n' for token in TOKENS))
        options = [f"-dict={words}", "-max_len=20000", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(corpus)], untrusted.take, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
