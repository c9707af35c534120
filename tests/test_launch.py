"""Launch scripts: clean for shellcheck, and run for real; what Slurm itself would do is stood in for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TINY = ["--steps", "10", "--width", "16", "--layers", "1", "--length", "16", "--batch", "2", "--windows", "8"]

# What stands in for Slurm: the first node's name, and a task of each of two nodes.
SCONTROL = "#!/bin/sh\n[ \"$1 $2\" = 'show hostnames' ] || exit 2\necho localhost\necho localhost\n"
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def environment(more: dict[str, str], folder: Path | None = None) -> dict[str, str]:
    """That of a shell in which the package is installed, with the stand-ins of a folder before all else."""
    paths = [str(folder)] if folder else []
    path = os.pathsep.join([*paths, str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKS": "1"} | more


def started(script: str, *arguments: object, env: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", LAUNCH / script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def succeeded(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder of stand-ins."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    assert len(scripts) >= 4
    done = subprocess.run(["shellcheck", *scripts], env=environment({}), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)


def test_each_script_stands_in_the_table() -> None:
    table = (LAUNCH / "README.md").read_text()
    for name in ("torchrun.sh", "torchrun_nodes.sh", "slurm_train.sbatch", "slurm_reconstruct.sbatch"):
        assert f"| `{name}` |" in table and (LAUNCH / name).is_file()


def test_one_node_and_several_nodes_and_slurm_train_on_two_ranks(tmp_path, slurm) -> None:
    out = [tmp_path / name for name in ("one", "nodes", "job")]
    one = started("torchrun.sh", "--out", out[0], *TINY, env=environment({"RANKS": "2"}))
    succeeded(one)
    place = {"NODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    nodes = [environment(place | {"NODE_RANK": str(rank)}) for rank in (0, 1)]
    succeeded(*(started("torchrun_nodes.sh", "--out", out[1], *TINY, env=env) for env in nodes))
    job = {"SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": free_port()}
    succeeded(started("slurm_train.sbatch", "--out", out[2], *TINY, env=environment(job, slurm)))
    found = [json.loads((folder / "decay.json").read_text()) for folder in out]
    assert [record["ranks"] for record in found] == [2, 2, 2]
    # Two ranks are two ranks, whoever started them.
    assert found[0]["rows"] == found[1]["rows"] == found[2]["rows"]


def test_tasks_of_an_array_rebuild_what_one_worker_does(tmp_path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20))
    with PostHocEMA(model, tmp_path / "ema", snapshot_every=2) as ema:
        for _ in range(8):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn_like(parameter)
            ema.update()
    reconstruct(tmp_path / "ema", ["0.12", "decay:linear:0.5"], out=tmp_path / "one")
    for task in "01":
        env = environment({"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"})
        assert not (tmp_path / "two").exists()
        arguments = [tmp_path / "ema", tmp_path / "two", "0.12", "decay:linear:0.5"]
        succeeded(started("slurm_reconstruct.sbatch", *arguments, env=env))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
