"""Benchmarks: the accuracy report runs from end to end and holds what it promises. Says nothing about the numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of a quick run."""
    folder = tmp_path_factory.mktemp("accuracy")
    command = [sys.executable, str(_ROOT / "benchmarks" / "accuracy.py"), "--quick"]
    command += ["--cache", str(folder / "cache"), "--out", str(folder / "results")]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "results"


@pytest.fixture(scope="module")
def content(results: Path) -> dict[str, Any]:
    """The JSON of that run."""
    found: dict[str, Any] = json.loads((results / "accuracy.json").read_text())
    return found


def test_the_report_says_how_it_was_made(content: dict[str, Any]) -> None:
    assert set(content) == {"about", "grid", "trainings", "bars", "cases", "sparse"}
    assert set(content["about"]) == {"date", "command", "commit", "changed", "machine", "versions"}
    assert len(content["trainings"]) >= 4
    assert all({"claim", "passed", "found", "worst"} == set(bar) for bar in content["bars"])


def test_errors_are_finite_and_forecasts_positive(content: dict[str, Any]) -> None:
    for table in ("cases", "sparse"):
        rows = [dict(zip(content[table]["columns"], row, strict=True)) for row in content[table]["rows"]]
        assert rows
        assert all(math.isfinite(row["error"]) and row["error"] >= 0 for row in rows)
        assert all(row["forecast"] > 0 for row in rows if row["forecast"] is not None)


def test_every_training_has_every_method_and_dtype(content: dict[str, Any]) -> None:
    columns = content["cases"]["columns"]
    found = {(row[columns.index("training")], row[columns.index("method")]) for row in content["cases"]["rows"]}
    methods = {"ours", "ours, movement constant", "ours, movement measured"}
    methods |= {"paper", "unconstrained", "checkpoints, mean", "checkpoints, best fit"}
    assert {(training, method) for training in content["trainings"] for method in methods} <= found
    dtypes = {row[columns.index("storage")] for row in content["cases"]["rows"]}
    assert dtypes == {"float32", "float16", "bfloat16"}


def test_the_default_is_either_constant_or_measured(content: dict[str, Any]) -> None:
    columns, rows = content["cases"]["columns"], content["cases"]["rows"]
    run, numbers = columns.index("training"), slice(columns.index("target"), None)
    found: dict[tuple[str, int, str], dict[str, list[Any]]] = {}
    for row in rows:
        _, method, count, storage = row[run : run + 4]
        found.setdefault((row[run], count, storage), {}).setdefault(method, []).append(row[numbers])
    for methods in found.values():
        ours = methods["ours"]
        assert ours in (methods["ours, movement constant"], methods["ours, movement measured"])


def test_tables_and_picture_are_written(results: Path, content: dict[str, Any]) -> None:
    text = (results / "accuracy.md").read_text()
    assert all(training["title"] in text for training in content["trainings"].values())
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")
