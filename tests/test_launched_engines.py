"""Examples for DeepSpeed and accelerate, at a tiny size: each config on two ranks, each script by its launcher."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from zero_engines import started

from sharded_phema.store import open_run

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SIZE = ("--width", "16", "--layers", "1", "--length", "16", "--windows", "256", "--snapshot-every", "2")
SCRIPTS = ["accelerate_ddp.sh", "accelerate_fsdp2.sh", "accelerate_zero3.sh", "deepspeed.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    if (found := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def launched(folder: Path, script: str, *words: str, flags: str, **environment: str) -> str:
    """What a launch file prints, on two ranks and without GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment |= {"LAUNCH_FLAGS": flags.format(port=port), "RANKS": "2", "OMP_NUM_THREADS": "1"}
    path = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Of the test alone: on CPU accelerate makes DistributedDataParallel of FSDP, without a word.
    code = "import os, sys\nif 'RANK' in os.environ:\n    sys.path.append({!r})\n"
    code += "    import accelerated\n    keep = accelerated.fsdp_on_cpu()\n    keep.__enter__()\n"
    (folder / "sitecustomize.py").write_text(code.format(str(ROOT / "tests")))
    done = subprocess.run(
        [LAUNCH / script, *words, "--out", folder / "out", *SIZE],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "loss of the weights" in done.stdout
    return done.stdout


def assert_stored(out: Path, t: float) -> None:
    assert open_run(out / "ema").snapshots[-1].t == t
    assert len(list((out / "checkpoint" / "ema").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("kind", "expected", "environment"),
    [
        ("ddp", "DistributedDataParallel of Parameter", {"ACCELERATE_USE_CPU": "true"}),
        ("fsdp2", "FSDPGPT of DTensor", {"ACCELERATE_USE_CPU": "true"}),
        ("zero3", "DeepSpeedEngine of Parameter", {}),
    ],
)
def test_accelerate_launch(tmp_path: Path, kind: str, expected: str, environment: dict[str, str]) -> None:
    words = ("--steps", "3", "--batch", "4")
    flags = "--main_process_port {port}"
    printed = launched(tmp_path, f"accelerate_{kind}.sh", *words, flags=flags, **environment)
    assert f"{expected} on 2 ranks, 48 samples" in printed
    assert_stored(tmp_path / "out", 48)


def test_deepspeeds_launcher(tmp_path: Path) -> None:
    words = ("zero3", "--steps", "3")
    printed = launched(tmp_path, "deepspeed.sh", *words, flags="--num_accelerators 2 --master_port {port}")
    assert "ZeRO 3 on 2 ranks, 3 steps, 192 samples" in printed
    assert_stored(tmp_path / "out", 192)


def engines_body(root: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import train_deepspeed

    for name in ("zero1", "zero2", "zero3_offload"):
        sys.argv = ["train_deepspeed.py", "--config", str(LAUNCH / "configs" / f"{name}.json"), *SIZE]
        with started():
            sys.argv += ["--out", str(root / name), "--steps"]
            for words in (["2"], ["3", "--resume"]) if name == "zero2" else (["2"],):
                sys.argv, before = [*sys.argv, *words], sys.argv
                train_deepspeed.main()
                dist.barrier()
                sys.argv = before


def test_every_config_of_deepspeed_and_a_resumed_run(tmp_path: Path) -> None:
    run_ranks(2, engines_body, tmp_path, timeout=250.0)
    for name, samples in (("zero1", 128), ("zero2", 192), ("zero3_offload", 128)):
        assert_stored(tmp_path / name, samples)


def plain_body(root: Path) -> None:
    dist.destroy_process_group()  # one process, as python starts it
    sys.path.insert(0, str(ROOT / "examples"))
    import train_accelerate

    os.environ["ACCELERATE_USE_CPU"] = "true"
    begin = ["train_accelerate.py", *SIZE, "--batch", "4", "--out", str(root), "--steps"]
    for words in (["2"], ["3", "--resume"]):
        sys.argv = [*begin, *words]
        train_accelerate.main()
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_accelerate_without_a_launcher_and_a_resumed_run(tmp_path: Path) -> None:
    run_ranks(1, plain_body, tmp_path)
    assert_stored(tmp_path, 24)


@pytest.mark.parametrize("example", ["train_accelerate.py", "train_deepspeed.py", "gpt.py"])
def test_examples_are_short(example: str) -> None:
    assert len((ROOT / "examples" / example).read_text().splitlines()) < 120
