"""The demo: its mathematics against closed forms, and its scripts end to end on two ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"
TARGETS = ["0.02", "0.03", "0.05", "0.07", "0.10", "0.13", "0.15", "0.18", "0.20", "0.23", "0.26"]
FIGURES = ("error.png", "samples.png")

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def digits(monkeypatch):
    """Makes the demo's modules importable by their bare names, as they are when torchrun starts its scripts."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(DIGITS)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(DIGITS)):
            del sys.modules[name]


def test_preconditioning_gives_inputs_and_targets_of_unit_variance(digits):
    from model import preconditioning

    sigma, sigma_data = torch.logspace(-3, 2, 50, dtype=torch.float64), 0.5
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, sigma_data)
    # Karras et al. 2022, appendix B.6: Var[c_in (y + n)] = 1, and Var[(y - c_skip (y + n)) / c_out] = 1 ...
    ones = torch.ones_like(sigma)
    torch.testing.assert_close(c_in**2 * (sigma**2 + sigma_data**2), ones)
    torch.testing.assert_close(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2, ones)
    # ... with the c_skip that makes c_out smallest, so that what the raw network gets wrong is amplified least.
    for other in (c_skip * 0.99, c_skip * 1.01):
        assert ((1 - other) ** 2 * sigma_data**2 + other**2 * sigma**2 > c_out**2).all()
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def test_loss_weight_undoes_the_scale_of_the_output(digits):
    from diffusion import loss_weight
    from model import preconditioning

    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(loss_weight(sigma) * preconditioning(sigma).c_out ** 2, torch.ones_like(sigma))


def test_sampling_ideal_denoiser_of_a_gaussian_gives_that_gaussian(digits):
    from diffusion import sample

    # For data ~ N(m, s^2) the ideal denoiser is linear and the flow maps noise z to m + s z (as sigma_max >> s).
    mean, spread = 0.3, 0.5

    def denoise(x, sigma, label):
        sigma = sigma[:, None, None, None]
        return (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)

    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = sample(denoise, noise, torch.zeros(20, dtype=torch.int64), steps=200)
    # Left over: Heun's error at 200 steps, and the mean seen through sigma_max = 80.
    torch.testing.assert_close(images, mean + spread * noise, rtol=0, atol=5e-3)


def test_frechet_distance_of_gaussians_equals_its_closed_form(digits):
    from scores import Statistics, frechet_distance

    # Covariances that commute: |difference of means|^2 + sum of (difference of standard deviations)^2.
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    deviations = torch.tensor([[1.0, 2.0, 3.0], [0.5, 2.5, 0.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 2.0]], dtype=torch.float64)
    a, b = (
        Statistics(mean, rotation @ (deviation**2).diag() @ rotation.T)
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = (1 + 4 + 0) + (0.25 + 0.25 + 9)
    # The root of an eigenvalue that is 0 up to rounding, 1e-16, is 1e-8.
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_split_is_fixed_centred_and_of_the_promised_spread(digits):
    from data import load_split

    train, held_out, *_ = load_split()
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.images.std().item() == pytest.approx(0.5, abs=1e-5)
    assert torch.equal(load_split().train.images, train.images)


def torchrun(*arguments: object) -> str:
    """Standard output of a script on two ranks."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


def python(*arguments: object) -> str:
    """Standard output of a script."""
    command, environment = [sys.executable, *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_runs_from_training_to_figures_on_two_ranks(tmp_path):
    run = tmp_path / "demo"
    torchrun(DIGITS / "train.py", "--out", run, "--tiny", "--steps", 400)
    sweep = ("-m", "sharded_phema", "sweep", run / "ema", "--targets", ",".join(TARGETS))
    for name, launch in {"frechet": torchrun, "loss": python}.items():
        launch(*sweep, "--metric", f"{DIGITS}/metric.py:rough_{name}", "--scores", run / f"{name}.jsonl")
    printed = python(DIGITS / "report.py", run, "--tiny")

    report = json.loads((run / "report.json").read_text())
    assert [row["sigma_rel"] for row in report["widths"]] == [float(target) for target in TARGETS]
    assert all(math.isfinite(row[key]) for row in [report["raw"], *report["widths"]] for key in ("loss", "frechet"))
    # Oracle: the two widths that training tracked directly all the way.
    assert [row["sigma_rel"] for row in report["errors"]] == [0.15, 0.2]
    for row in report["errors"]:
        assert 0 < row["forecast"] < 2e-3
        assert 0.5 <= row["measured"] / row["forecast"] <= 2
    assert "0.26" in printed
    from matplotlib.image import imread

    python("-m", "sharded_phema", "plot", "sweep", run / "frechet.jsonl", "--out", run / "quality.png")
    for name in (*FIGURES, "quality.png"):
        image = imread(run / name)
        assert image.shape[1] >= 800 and image.std() > 0.02, name
