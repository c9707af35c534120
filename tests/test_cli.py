"""The command line: help, tables, JSON, exit codes, and errors as their reader sees them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import listing
from commands import run
from safetensors.torch import load_file
from torch import nn
from typer.main import get_command

from sharded_phema.cli import app
from sharded_phema.posthoc import PostHocEMA

COMMANDS = ["plan", "info", "reconstruct", "verify", "prune", "sweep", "import", "plot"]


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
    for command in (
        ["plan"],
        ["info"],
        ["reconstruct"],
        ["verify"],
        ["sweep"],
        ["plot", "profiles"],
        ["plot", "forecast"],
    ):
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
        "import": [
            "--copy",
            "--from",
            "--json",
            "--key",
            "--memory",
            "--out",
            "--prefix",
            "--profile",
            "--start",
            "--time-pattern",
            "--unit",
            "--update-every",
        ],
        "info": ["--json"],
        "reconstruct": [
            "--device",
            "--dry-run",
            "--dtype",
            "--force",
            "--format",
            "--from",
            "--json",
            "--leave-out",
            "--like",
            "--max-shard-size",
            "--memory",
            "--metric",
            "--movement",
            "--out",
            "--per-tensor",
            "--precision",
            "--reading",
            "--strict",
            "--tolerance",
            "--worker",
            "--workers",
        ],
        "verify": ["--json"],
        "prune": ["--bytes", "--count", "--json", "--tolerance", "--yes"],
        "sweep": [
            "--base",
            "--better",
            "--command",
            "--disk",
            "--dtype",
            "--evaluations",
            "--form",
            "--group",
            "--json",
            "--like",
            "--memory",
            "--metric",
            "--per-tensor-search",
            "--repeats",
            "--scores",
            "--scratch",
            "--search",
            "--second",
            "--targets",
            "--times",
            "--tolerance",
        ],
        "plot": {
            "profiles": ["--out"],
            "forecast": ["--out", "--time", "--tolerance"],
            "coefficients": ["--out", "--tolerance"],
            "timeline": ["--out"],
            "sweep": ["--better", "--kind", "--out"],
            "report": ["--better", "--out", "--run"],
        },
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
    words = ("reconstruct", ema, "0.12", "decay:linear:0.2", "--max-shard-size", "1KB", "--out")
    assert run(*words, tmp_path / "1").returncode == 0
    done = launch(*words, tmp_path / "2", "--json", ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # once, by the first of them
    assert (found["workers"], found["finished"], found["written"]) == (2, True, 2 * 4 * 620)
    one, two = (listing(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one == two and sum(name.endswith(".safetensors") for name in one) == 4
    assert files(tmp_path) == sorted(["1", "2", *(f"{n}/{name}" for n in (1, 2) for name in one)])


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(ema, tmp_path) -> None:
    # Oracle: what the same words without --dry-run say, and do.
    words = ("reconstruct", ema, "0.12", "decay:linear:0.2", "--out", tmp_path / "out", "--workers", 3)
    before = files(ema)
    done = run(*words, "--dry-run", "--json")
    assert (done.returncode, done.stderr, files(tmp_path), files(ema)) == (0, "", [], before)
    planned = json.loads(done.stdout)
    table = run(*words, "--dry-run").stdout
    assert "to rebuild from" in table and "bytes to read" in table and "coefficients" in table
    made = json.loads(run(*words[:-2], "--json").stdout)
    assert planned["targets"] == made["targets"] and len(planned["sources"]) == made["sources"]
    assert (planned["bytes_to_read"], planned["bytes_to_write"]) == (made["bytes_read"], made["written"])
    assert [worker["worker"] for worker in planned["workers"]] == [0, 1, 2]
    for key in ("bytes_to_read", "bytes_to_write"):
        assert sum(worker[key] for worker in planned["workers"]) == planned[key]
    sums = [math.fsum(column) for column in zip(*(s["coefficients"] for s in planned["sources"]), strict=True)]
    assert sums == pytest.approx([1.0, 1.0], abs=1e-9), "an average of what stands still is what stands still"


def test_workers_started_apart_share_the_work_and_the_last_one_finishes_it(ema, tmp_path) -> None:
    assert run("reconstruct", ema, "0.12", "--out", tmp_path / "one").returncode == 0
    words = ("reconstruct", ema, "0.12", "--out", tmp_path / "many", "--workers", 2)
    # So small a model is one block: one of them has nothing to do, and finds nothing done.
    shares = json.loads(run(*words, "--dry-run", "--json").stdout)["workers"]
    idle, busy = sorted(shares, key=lambda share: share["blocks"])
    assert (idle["blocks"], busy["blocks"]) == (0, 1)
    early = run(*words, "--worker", idle["worker"])
    assert early.returncode == 0 and f"{tmp_path}/many appears when all are" in early.stdout.replace("\n", "")
    assert files(tmp_path / "many") == []
    late = json.loads(run(*words, "--worker", busy["worker"], "--json").stdout)
    assert (late["finished"], late["workers"], late["written"]) == (True, 2, 4 * 620)
    assert listing(tmp_path / "many") == listing(tmp_path / "one")


@pytest.mark.parametrize(
    "words", [["--worker", 2, "--workers", 2], ["--worker", 0], ["--workers", 2], ["--workers", 0, "--dry-run"]]
)
def test_a_worker_that_cannot_be_is_refused(ema, tmp_path, words) -> None:
    done = run("reconstruct", ema, "0.12", "--out", tmp_path / "out", *words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "worker" in done.stderr
    assert files(tmp_path) == []


def test_an_earlier_output_is_replaced_with_force_and_anything_else_is_not(ema, tmp_path) -> None:
    # Oracle: an output made where there was none.
    assert run("reconstruct", ema, "0.07", "--out", tmp_path / "fresh").returncode == 0
    assert run("reconstruct", ema, "0.12", "--out", tmp_path / "out").returncode == 0
    before = listing(tmp_path / "out")
    refused = run("reconstruct", ema, "0.07", "--out", tmp_path / "out")
    assert refused.returncode == 1 and "--force" in refused.stderr and listing(tmp_path / "out") == before
    assert run("reconstruct", ema, "0.07", "--out", tmp_path / "out", "--force").returncode == 0
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")
    (tmp_path / "out" / "mine").write_text("precious")
    kept = run("reconstruct", ema, "0.12", "--out", tmp_path / "out", "--force")
    assert kept.returncode == 1 and (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_damaged_snapshot_is_left_out_with_its_cost_and_strict_refuses(ema, tmp_path) -> None:
    # Oracle: the same words with --leave-out, on the run as it was.
    shutil.copytree(ema, tmp_path / "run")
    snapshots = json.loads(run("info", tmp_path / "run", "--json").stdout)["snapshots"]
    victim = Path(next(s for s in snapshots if s["t"] == 250)["folder"])
    words = ("0.12", "--tolerance", "exact", "--json", "--out")
    less = run("reconstruct", ema, *words, tmp_path / "less", "--leave-out", victim.name)
    assert less.returncode == 0 and "left out as asked" in less.stderr
    path = next(victim.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    strict = run("reconstruct", tmp_path / "run", *words, tmp_path / "strict", "--strict")
    assert strict.returncode == 1 and victim.name in strict.stderr and "hint: " in strict.stderr
    done = run("reconstruct", tmp_path / "run", *words, tmp_path / "out")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and "snapshots were left out" in done.stderr
    assert "what that costs" in done.stderr
    (lost,) = found["left_out"]
    assert Path(lost["snapshot"]).name == victim.name and "is damaged between bytes" in lost["reason"]
    assert found["targets"][0]["forecast"] == json.loads(less.stdout)["targets"][0]["forecast"]
    name = Path("0.12") / "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "less" / name).read_bytes()
    unknown = run("reconstruct", ema, *words, tmp_path / "no", "--leave-out", "nonesuch")
    assert unknown.returncode == 1 and "holds no such snapshot" in unknown.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less", "out", "run"]


def test_memory_precision_and_device_are_taken_and_checked(ema, tmp_path) -> None:
    words = ("reconstruct", ema, "0.12", "--out")
    planned = [
        json.loads(run(*words, tmp_path / "out", "--dry-run", "--json", "--memory", size).stdout)["memory"]
        for size in ("1GiB", "65MiB")
    ]
    assert planned[1] <= 65 << 20 < planned[0] <= 1 << 30
    outs = []
    for index, options in enumerate(([], ["--memory", "65MiB", "--device", "cpu"], ["--precision", "float64"])):
        done = run(*words, tmp_path / f"{index}", *options)
        assert done.returncode == 0, done.stderr
        outs.append(load_file(tmp_path / f"{index}" / "0.12" / "model.safetensors"))
    assert all(torch.equal(outs[0][key], outs[1][key]) for key in outs[0]), "the budget does not show in the bits"
    for key in outs[0]:
        # Sums of tens of terms, each rounded to 2^-24 of magnitudes that add up to a few times the result.
        torch.testing.assert_close(outs[0][key], outs[2][key], rtol=1e-5, atol=1e-6)
    for option, value, text in (
        ("--memory", "1MB", "need at least"),
        ("--memory", "much", "found 'much'"),
        ("--device", "abacus", "cannot be used"),
    ):
        done = run(*words, tmp_path / "no", option, value)
        assert done.returncode == 1 and text in done.stderr and "hint: " in done.stderr
    assert run(*words, tmp_path / "no", "--precision", "float16").returncode == 2
    assert not (tmp_path / "no").exists()


def test_the_configuration_of_a_model_is_copied_beside_each_output(ema, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin", "phema.json"):
        (tmp_path / "model" / name).write_text("{}")
    done = run("reconstruct", ema, "0.12", "0.07", "--out", tmp_path / "out", "--like", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    for slug in ("0.12", "0.07"):
        expected = ["config.json", "model.safetensors", "phema.json", "tokenizer.json"]
        assert files(tmp_path / "out" / slug) == expected
        assert (tmp_path / "out" / slug / "phema.json").read_text() != "{}"
    refused = run("reconstruct", ema, "0.12", "--out", tmp_path / "no", "--like", tmp_path)
    assert refused.returncode == 1 and "config.json" in refused.stderr and not (tmp_path / "no").exists()


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
