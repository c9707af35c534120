"""README's scripts and commands, taken from the file and run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
from safetensors.torch import load_file

DRAWN = ("profiles.png", "forecast.png", "sweep.png")
README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language. Those marked sh install things; they are what runs this test."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where train.py lies and every command has run, in README's order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "train.py").write_text(blocks("python")[0])
    (folder / "measure.py").write_text(next(block for block in blocks("python") if block.startswith("# measure.py")))
    foreign.write_hf(folder / "checkpoints", foreign.raw())
    for line in "".join(blocks("bash")).strip().splitlines():
        done = run(shlex.split(line, comments=True), folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return folder


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_every_command_of_the_readme_does_what_it_says(folder) -> None:
    targets = ["0.12", "power-gamma-5", "window-0.2", "decay-linear-0.2"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(targets)
    for target in targets:
        shapes = {name: tuple(t.shape) for name, t in load_file(folder / "out" / target / "model.safetensors").items()}
        assert shapes == {"0.weight": (256, 64), "0.bias": (256,), "2.weight": (64, 256), "2.bias": (64,)}
    imported = load_file(folder / "out-imported" / "window-0.3" / "model.safetensors")
    assert sorted(imported) == sorted(foreign.tiny().state_dict())
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in DRAWN)


def test_the_python_interface_of_the_readme_works(folder) -> None:
    done = run([sys.executable, "-c", blocks("python")[1]], folder)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.1
    assert (folder / "out-python" / "decay-cosine-0.2" / "phema.json").is_file()


def test_the_lines_that_load_an_average_into_a_model_work(folder) -> None:
    script = (
        "import torch\nfrom torch import nn\nfrom safetensors.torch import load_file\n"
        "model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))\n"
        + next(block for block in blocks("python") if "load_into" in block)
        + "stored = load_file('out-large/0.12/model.safetensors')\n"
        "assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())\n"
    )
    done = run([sys.executable, "-c", script], folder)
    assert done.returncode == 0, done.stderr


def test_the_lines_of_the_readme_for_averages_of_ones_own_work(folder) -> None:
    own = 'import torch\nnarrow, wide = {"w": torch.arange(3.0)}, {"w": torch.ones(3)}\n'
    save, load = next(block for block in blocks("python") if "SnapshotWriter" in block).split("run = ")
    check = '\nassert narrow["w"].tolist() == [0, 1, 2] and wide["w"].tolist() == [1, 1, 1]'
    forget = '\nfor average in (narrow, wide):\n    average["w"].zero_()\nrun = '
    done = run([sys.executable, "-c", own + save + forget + load + check], folder)
    assert done.returncode == 0, done.stderr


def test_the_resume_lines_of_the_readme_work(folder) -> None:
    script = blocks("python")[0].replace("run/ema", "again/ema")
    head, tail = script.split("with torch.no_grad()")
    save, load = next(block for block in blocks("python") if '"ema": ema' in block).strip().splitlines()
    head = "import torch.distributed.checkpoint as dcp\n" + head.replace("range(1, 401)", "range(1, 8)")
    fresh = 'ema = PostHocEMA(model, "other/ema", sigma_rels=(0.05, 0.10))\n'
    check = "assert ema.t == 7\n"
    (folder / "resume.py").write_text(head + save + "\n" + fresh + load + "\n" + check + "with torch.no_grad()" + tail)
    done = run(["torchrun", "--standalone", "--nproc-per-node", "2", "resume.py"], folder)
    assert done.returncode == 0, done.stderr


def test_links_and_figures_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://") or (README.parent / target).is_file(), target
