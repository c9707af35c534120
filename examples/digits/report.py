"""Puts together what sweeps found of a run, with its raw weights; writes tables, report.json and two figures.

examples/digits/report.py runs/demo
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sharded_phema import reconstruct
from sharded_phema.scores import read_scores

from data import CLASSES, load_split
from figures import draw_error, draw_samples
from model import Denoiser, ModelConfig
from scores import ROUGH, Effort, Judge, generate

SHOWN_ROWS = 6
TRACKED = (0.15, 0.20)


def parse_options() -> tuple[Path, Effort]:
    """Folder of the run and the effort to spend, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--samples", type=int, help="digits to generate for each score (default: 500, tiny: 60)")
    parser.add_argument("--tiny", action="store_true", help="rough scores in a few seconds: a test")
    given = parser.parse_args()
    for name in ("frechet", "loss"):
        if not (given.run / f"{name}.jsonl").is_file():
            parser.error(f"no scores: sweep {given.run / 'ema'} with --scores {given.run / name}.jsonl first")
    effort = ROUGH if given.tiny else Effort()
    return given.run, replace(effort, samples=given.samples or effort.samples)


def swept(run: Path) -> list[dict[str, float]]:
    """Both scores of every width, narrowest first."""
    found = {name: {s.sigma_rel: s.score for s in read_scores(run / f"{name}.jsonl")} for name in ("loss", "frechet")}
    return [{"sigma_rel": w, "loss": loss, "frechet": found["frechet"][w]} for w, loss in sorted(found["loss"].items())]


def rebuild(run: Path, width: float) -> None:
    """Writes the best average, and those that training followed directly, from both runs."""
    for name, widths in {"ema": {*TRACKED, width}, "truth": set(TRACKED)}.items():
        reconstruct(run / name, sorted(widths), out=run / f"{name}-rebuilt", force=True)


def rebuilt(folder: Path) -> dict[float, Path]:
    """Folders of rebuilt averages by their relative width, narrowest first."""
    found = {float(json.loads(path.read_text())["target"]): path.parent for path in folder.glob("*/phema.json")}
    return dict(sorted(found.items()))


def load_model(folder: Path, device: torch.device) -> Denoiser:
    """The unsharded network with the weights of one folder."""
    state = load_file(folder / "model.safetensors")
    model = Denoiser(ModelConfig.of(state)).to(device)
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


def errors(run: Path) -> list[dict[str, float]]:
    """Distance of rebuilt averages from directly tracked ones, relative to that of the raw weights."""
    widths, raw = rebuilt(run / "ema-rebuilt"), flat_weights(run / "raw")
    rows = []
    for width, folder in rebuilt(run / "truth-rebuilt").items():
        tracked = flat_weights(folder)
        error = (flat_weights(widths[width]) - tracked).norm() / (raw - tracked).norm()
        forecast = json.loads((widths[width] / "phema.json").read_text())["forecast"]
        rows.append({"sigma_rel": width, "measured": error.item(), "forecast": forecast})
    return rows


def flat_weights(folder: Path) -> torch.Tensor:
    """All weights of one folder, end to end by name, in float64."""
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])


def best(report: dict[str, Any], key: str) -> dict[str, float]:
    """The width with the lowest score of that name."""
    return min(report["widths"], key=lambda row: row[key])


def print_tables(report: dict[str, Any]) -> None:
    """The report for people, on stdout."""
    quality = Table("σ_rel", "held-out loss", "Fréchet distance", title="Quality against averaging length (* best)")
    for row in [report["raw"], *report["widths"]]:
        loss, frechet = ("*" if row is best(report, key) else " " for key in ("loss", "frechet"))
        name = f"{row['sigma_rel']:.2f}" if "sigma_rel" in row else "raw"
        quality.add_row(name, f"{row['loss']:.4f} {loss}", f"{row['frechet']:.3f} {frechet}")
    error = Table("σ_rel", "measured", "forecast", title="Error of rebuilt averages")
    for row in report["errors"]:
        error.add_row(f"{row['sigma_rel']:.2f}", f"{row['measured']:.2e}", f"{row['forecast']:.2e}")
    console = Console()
    console.print(quality)
    console.print(
        f"Features: a classifier that names {report['classifier_accuracy']:.1%} of the held-out digits rightly."
    )
    console.print(f"Held-out real digits, for scale: Fréchet distance {report['frechet_of_held_out_digits']:.3f}.\n")
    console.print(error)
    console.print("Error: |rebuilt - tracked| / |raw - tracked|, over all weights.")


def draw_figures(run: Path, report: dict[str, Any], effort: Effort, device: torch.device) -> None:
    """Writes error.png and samples.png."""
    draw_error(run / "error.png", report["errors"])
    width, split = best(report, "frechet")["sigma_rel"], load_split()
    few = replace(effort, samples=SHOWN_ROWS * CLASSES)
    sources = {"raw weights": run / "raw", f"same noise, averaged at {width:.0%}": rebuilt(run / "ema-rebuilt")[width]}
    blocks = {name: generate(load_model(folder, device), few, device) for name, folder in sources.items()}
    blocks["real digits, held out"] = split.held_out.rows(SHOWN_ROWS)
    draw_samples(run / "samples.png", {name: split.pixels(images.cpu()) for name, images in blocks.items()}, CLASSES)


def main() -> None:
    """Scores the raw weights, rebuilds the best average, and reports."""
    run, effort = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge, raw, widths = Judge(load_split(), effort, device), load_model(run / "raw", device), swept(run)
    report = {
        "classifier_accuracy": judge.accuracy(),
        "frechet_of_held_out_digits": judge.frechet_of_held_out(),
        "raw": {"loss": judge.loss_of(raw), "frechet": judge.frechet_of(raw)},
        "widths": widths,
    }
    rebuild(run, best(report, "frechet")["sigma_rel"])
    report["errors"] = errors(run)
    (run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_figures(run, report, effort, device)
    print_tables(report)


if __name__ == "__main__":
    main()
