"""The command line: help, tables, JSON, exit codes, and errors as their reader sees them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from torch import nn
from typer.main import get_command

from sharded_phema.cli import app
from sharded_phema.posthoc import PostHocEMA

COMMANDS = ["plan", "info", "reconstruct", "verify", "prune", "plot"]


def launch(*words: object, ranks: int) -> subprocess.CompletedProcess[str]:
    """The command line in processes of its own, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, "-m", "sharded_phema", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def ema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 snapshots of a small random walk."""
    root = tmp_path_factory.mktemp("run") / "ema"
    model = nn.Linear(30, 20)
    steps = torch.Generator().manual_seed(3)
    with PostHocEMA(model, root, snapshot_every=50) as tracked, torch.no_grad():
        for _ in range(400):
            for param in model.parameters():
                param += 0.01 * torch.randn(param.shape, generator=steps)
            tracked.update()
    return root


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_help_names_every_command_and_gives_an_example_of_each() -> None:
    top = run("--help")
    assert top.returncode == 0 and all(command in top.stdout for command in COMMANDS)
    for command in (["plan"], ["info"], ["reconstruct"], ["verify"], ["plot", "profiles"], ["plot", "forecast"]):
        page = run(*command, "--help")
        assert page.returncode == 0
        assert (
            f"Example: {'torchrun' if command == ['reconstruct'] else 'sharded-phema ' + ' '.join(command)}"
            in page.stdout
        )


def test_flags_are_what_they_were() -> None:
    """The set of flags is a promise to scripts: change this list only together with CHANGELOG."""

    def flags(command) -> dict:
        inner = getattr(command, "commands", {})
        own = sorted(name for parameter in command.params for name in parameter.opts if name.startswith("--"))
        return {name: flags(sub) for name, sub in inner.items()} if inner else own  # type: ignore[return-value]

    assert flags(get_command(app)) == {
        "plan": ["--json", "--length", "--parameters", "--sigma-rels", "--snapshots", "--stillness", "--tolerance"],
        "info": ["--json"],
        "reconstruct": [
            "--dtype",
            "--format",
            "--json",
            "--max-shard-size",
            "--metric",
            "--movement",
            "--out",
            "--per-tensor",
            "--tolerance",
        ],
        "verify": ["--json"],
        "prune": ["--bytes", "--count", "--json", "--tolerance", "--yes"],
        "plot": {"profiles": ["--out"], "forecast": ["--out"]},
    }


def test_version_is_the_packages() -> None:
    from sharded_phema import __version__

    assert run("--version").stdout.strip() == __version__


def test_plan_forecasts_by_number_of_snapshots_and_counts_the_disk() -> None:
    found = json.loads(run("plan", "0.15", "0.20", "--snapshots", "8,16", "--parameters", "1.5e9", "--json").stdout)
    # Bytes: snapshots x two averages x 4 bytes. Forecasts: computed with 60 digits for 16 uniform snapshots elsewhere.
    assert [plan["bytes"] for plan in found["plans"]] == [8 * 2 * 6 * 10**9, 16 * 2 * 6 * 10**9]
    assert found["plans"][1]["forecasts"]["0.15"] == pytest.approx(4.3e-4, rel=0.02)
    assert found["plans"][1]["forecasts"]["0.2"] == pytest.approx(7.5e-4, rel=0.02)
    assert "16 snapshots" in run("plan").stdout and "512 GB" in run("plan").stdout


def test_plan_recommends_what_to_track_and_says_so_when_nothing_will_do() -> None:
    words = ("plan", "0.07:0.20", "--snapshots", "8", "--tolerance", "1e-2", "--parameters", "1e6", "--json")
    found = json.loads(run(*words).stdout)
    assert all(max(plan["forecasts"]) <= 1e-2 and plan["size"] > 0 for plan in found["recommended"])
    assert {plan["dtype"] for plan in found["recommended"]} >= {"float32"}
    done = run("plan", "0.20", "--snapshots", "8", "--tolerance", "1e-12")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and "hint: " in done.stderr and "1e-12" in done.stderr


def test_info_says_what_a_run_holds(ema) -> None:
    found = json.loads(run("info", ema, "--json").stdout)
    assert (found["unit"], found["elements"], found["unfinished"], found["abandoned"]) == ("steps", 620, 0, 0)
    assert [snapshot["t"] for snapshot in found["snapshots"]] == [50 * i for i in range(1, 9)]
    assert found["averages"][0].startswith("sigma_rel 0.05 (power:gamma=16.97")
    table = run("info", ema).stdout
    assert "620" in table and "400" in table and "sigma_rel 0.1 " in table


def test_reconstruct_writes_a_folder_a_target_and_says_how_good_they_are(ema, tmp_path) -> None:
    done = run("reconstruct", ema, "0.12", "decay:linear:0.2", "0.05", "--out", tmp_path / "out", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == "", "no bar where nobody looks"
    assert [target["target"] for target in found["targets"]] == ["0.12", "decay:linear:0.2", "0.05"]
    assert 0 < found["targets"][0]["forecast"] < 1e-2 and found["targets"][2]["fit_part"] == 0
    assert found["bytes_read"] == found["sources"] * 4 * 620
    assert all(t["forecast"] == pytest.approx(math.hypot(t["fit_part"], t["rounding_part"])) for t in found["targets"])
    for target in found["targets"]:
        assert {key: tuple(v.shape) for key, v in load_file(f"{target['folder']}/model.safetensors").items()} == {
            "weight": (20, 30),
            "bias": (20,),
        }
    table = run("reconstruct", ema, "0.12", "--out", tmp_path / "again").stdout
    assert "0.12" in table and "forecast error" in table


def test_two_processes_write_the_same_bytes_as_one(ema, tmp_path) -> None:
    assert run("reconstruct", ema, "0.12", "--out", tmp_path / "1").returncode == 0
    assert launch("reconstruct", ema, "0.12", "--out", tmp_path / "2", ranks=2).returncode == 0
    one, two = (tmp_path / str(ranks) / "0.12" / "model.safetensors" for ranks in (1, 2))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["EMA", "0.5"], "sigma_rel must be a number above 0 and below 0.2886, found 0.5", "try a width from 0.03"),
        (["EMA", "0"], "sigma_rel must be a number above 0", "try a width"),
        (["EMA", "widnow:0.2"], "widnow", "window"),
        (["EMA", "0.12@t=10"], "training time 10 lies outside the snapshots", "choose a time from 50 to 400"),
        (["EMA", "0.12@t=401"], "training time 401 lies outside the snapshots", "leave @t=... out"),
        (["EMA", "0.02", "--tolerance", "1e-6"], "above the tolerance 1e-06 with the 8 snapshots", "raise --tolerance"),
        (["NOWHERE", "0.12"], "is no run folder: expected run.json", "the folder that PostHocEMA was made with"),
        (["EMA", "0.12", "--dtype", "int8"], "expected one of ['bfloat16', 'float16', 'float32']", "try float32"),
        (["EMA", "0.12", "--max-shard-size", "huge"], "expected a size such as 5GB or 512MiB, found 'huge'", "5GB"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_with_its_mend_and_nothing_written(ema, tmp_path, words, error, hint) -> None:
    before = files(ema)
    named = [ema if word == "EMA" else tmp_path / "nowhere" if word == "NOWHERE" else word for word in words]
    done = run("reconstruct", *named, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ") and error in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]
    assert len(lines) == 2
    assert (files(ema), files(tmp_path)) == (before, [])


def test_an_output_folder_that_is_not_empty_is_refused_and_kept(ema, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    done = run("reconstruct", ema, "0.12", "--out", tmp_path / "out")
    assert done.returncode == 1 and "is not an empty folder; nothing is ever overwritten" in done.stderr
    assert files(tmp_path) == ["out", "out/mine"] and (tmp_path / "out" / "mine").read_text() == "precious"


def test_under_torchrun_an_error_is_printed_once_and_ends_every_rank(ema, tmp_path) -> None:
    done = launch("reconstruct", ema, "0.5", "--out", tmp_path / "out", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: target '0.5'") == 1
    assert files(tmp_path) == []


@pytest.mark.parametrize("words", [["reconstruct"], ["plan", "--snapshots", "few"], ["nonsense"], ["info"], ["plot"]])
def test_usage_errors_exit_2(words) -> None:
    done = run(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_plots_are_drawn_from_the_profiles_themselves(ema, tmp_path) -> None:
    for words in (["profiles", ema, "0.12", "window:0.2"], ["forecast", ema]):
        done = run("plot", *words, "--out", tmp_path / f"{words[0]}.png")
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / f"{words[0]}.png").read_bytes().startswith(b"\x89PNG")
    done = run("plot", "forecast", ema, "--out", tmp_path / "plot.docx")
    assert done.returncode == 1 and "expected a name that ends in one of .png" in done.stderr
