"""Benchmarks: the reports run from end to end and hold what they promise. Says nothing about the numbers."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import Free, no_flush

from sharded_phema import PostHocEMA
from sharded_phema.store import open_run

OURS = ("ours", "ours, 2 workers", "ours, one core", "ours, 2 workers, a core each")

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


@pytest.fixture(scope="module")
def reconstruction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of reconstruction at a toy size, where results of another size lay before."""
    out = tmp_path_factory.mktemp("reconstruct")
    (out / "reconstruct.json").write_text(json.dumps({"sizes": {}, "planned": {}, "kept": True}))
    command = [sys.executable, str(_ROOT / "benchmarks" / "reconstruct.py"), "--size", "20k", "--snapshots", "4"]
    command += ["--ranks", "2", "--targets", "3", "--caches", "warm", "--rounds", "1", "--out", str(out)]
    command += ["--plan", "32", "10", "4", "3"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_way_of_reconstruction_is_measured_or_says_why_not(reconstruction: Path) -> None:
    found = json.loads((reconstruction / "reconstruct.json").read_text())
    assert found["kept"], "what was not measured again stays"
    (case,) = found["sizes"]["20k"]["cases"]
    ways = {"plan", "bare read", "bare read and write", *OURS, "classic", "dcp.load"}
    assert case["ways"].keys() == ways and case["left out"].keys() == {"ema-pytorch"}
    assert all(way["best (s)"] > 0 and way["peak (MiB)"] > 0 for way in case["ways"].values())
    # The yardstick reads what the plan says, and the record of /proc beside it.
    assert 0 <= case["ways"]["bare read"]["asked (bytes)"] - case["planned bytes"] < 1000
    assert found["planned"]["peak (MiB)"] > found["planned"]["imported (MiB)"]
    assert "ema-pytorch: not measured" in (reconstruction / "reconstruct.md").read_text()


def test_every_way_of_reconstruction_comes_as_near_as_four_snapshots_allow(reconstruction: Path) -> None:
    (case,) = json.loads((reconstruction / "reconstruct.json").read_text())["sizes"]["20k"]["cases"]
    errors = {way: figures["errors"] for way, figures in case["ways"].items() if "errors" in figures}
    assert errors.keys() == {*OURS, "classic", "dcp.load"}
    for found in errors.values():
        assert found.keys() == {"0.02", "0.15", "0.28"}
        # The forecast is of walks in many steps, of which these have 32 from one snapshot to the next.
        assert found["0.15"] < 0.1 and max(found.values()) < 2 * case["worst forecast"]
    assert errors["ours"] == errors["ours, 2 workers"], "the same bytes for any number of workers"


def test_a_made_run_holds_what_a_training_of_the_same_weights_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Oracle: PostHocEMA, updated at every step; it tracks one of the targets too.
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    made, snapshots, steps = importlib.import_module("made"), 3, 8
    recipe = made.Recipe(3000, snapshots, 2, (0.05, 0.1), "float32", ("0.15",), steps)
    with no_flush():
        run = made.made_run(tmp_path / "made", recipe)
        numel, total = sum(math.prod(p.shape) for p in run.parameters), snapshots * steps
        rng = np.random.default_rng(0)
        moves = np.concatenate([rng.standard_normal((total, 4096)) for _ in range(2)], axis=1)[:, :numel]
        model = Free(weights=numel)
        with PostHocEMA(model, tmp_path / "real", sigma_rels=[0.05, 0.1, 0.15], snapshot_every=steps) as ema:
            for now in np.cumsum(moves / total**0.5, axis=0) + run.walks.still[:numel]:
                model.set(weights=torch.from_numpy(now))
                ema.update()
    found, real = open_run(run.root).snapshots, open_run(tmp_path / "real").snapshots
    assert [s.t for s in found] == [s.t for s in real] and [s.start for s in found] == [s.start for s in real]
    for ours, theirs in zip(found, real, strict=True):
        for average in range(2):
            values = [ours.read_flat(average, i, 0, math.prod(p.shape)) for i, p in enumerate(run.parameters)]
            # float32 in the one, float64 in the other until the end.
            np.testing.assert_allclose(np.concatenate(values), theirs.read_flat(average, 0, 0, numel), atol=2e-5)
    wanted = run.walks.wanted[0][:numel] + run.walks.still[:numel]
    np.testing.assert_allclose(wanted, real[-1].read_flat(2, 0, 0, numel), atol=2e-5)


def test_repeated_numbers_are_added_from_any_element_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: the index of each element, modulo the length.
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    add_tiled, tile = importlib.import_module("tiled").add_tiled, np.arange(7.0)
    for first in range(15):
        for count in range(25):
            out = np.ones(count)
            add_tiled(out, tile, first)
            np.testing.assert_array_equal(out, 1.0 + np.arange(first, first + count) % 7)


def test_the_cost_of_a_reconstruction_falls_with_workers_until_storage_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    predicted = importlib.import_module("costs").predicted
    speeds = {"read_gbps": 2.0, "write_gbps": 1.0, "gflops": 1e6, "shared_read_gbps": 8.0, "shared_write_gbps": 2.0}
    # 1e9 parameters of 2 bytes: 10 sources are 20 GB to read, 3 targets 6 GB to write.
    seconds = [predicted(1e9, 10, 3, workers, planning_s=1.0, **speeds).seconds for workers in (1, 2, 4, 64)]
    assert seconds == [1 + 10 + 6, 1 + 5 + 3, 1 + 2.5 + 3, 1 + 2.5 + 3]
    assert predicted(1e9, 10, 3, 1, planning_s=1.0, **(speeds | {"gflops": 1.0})).seconds == 1 + 60 + 6
