"""Scores the raw and the rebuilt weights of a run; writes a table, report.json and three figures.

torchrun --standalone --nproc-per-node 2 examples/digits/report.py runs/demo
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sharded_phema import reconstruct

from data import CLASSES, load_split
from figures import draw_error, draw_quality, draw_samples
from model import Denoiser, ModelConfig
from progress import progress
from ranks import process_group
from scores import Effort, Judge, generate

SHOWN_ROWS = 6


def parse_options() -> tuple[Path, Effort]:
    """Folder of the run and the effort to spend, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Not an option --run: torchrun takes it for an abbreviation of its own --run-path, even after the script's name.
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--samples", type=int, help="digits to generate for each width (default: 500, tiny: 60)")
    parser.add_argument("--tiny", action="store_true", help="rough scores in a few seconds: a test")
    given = parser.parse_args()
    if not (given.run / "rebuilt").is_dir():
        parser.error(f"no rebuilt averages: reconstruct {given.run / 'ema'} with --out {given.run / 'rebuilt'} first")
    effort = Effort(epochs=2, repeats=1, samples=60, steps=4) if given.tiny else Effort()
    return given.run, replace(effort, samples=given.samples or effort.samples)


def rebuild_tracked(run: Path) -> None:
    """Writes the averages that training followed directly in the form of rebuilt ones; every rank takes part."""
    if agreed(not (run / "truth-rebuilt").exists()):
        reconstruct(run / "truth", ["0.15", "0.20"], out=run / "truth-rebuilt")


def agreed(value: bool) -> bool:
    """Rank 0's value on every rank: ranks that look at a folder at different times could part ways."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def rebuilt(folder: Path) -> dict[float, Path]:
    """Folders of rebuilt averages by their relative width, narrowest first."""
    found = {float(json.loads(path.read_text())["target"]): path.parent for path in folder.glob("*/phema.json")}
    return dict(sorted(found.items()))


def load_model(run: Path, folder: Path, device: torch.device) -> Denoiser:
    """The unsharded network with the weights of one folder."""
    model = Denoiser(ModelConfig(**json.loads((run / "train.json").read_text())["model"])).to(device)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.requires_grad_(False)


def score_all(run: Path, folders: list[Path], judge: Judge, device: torch.device) -> list[dict[str, float]]:
    """Scores of all folders on every rank, each rank having done its share."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = [judge.score(load_model(run, folder, device)) for folder in progress(folders[rank::world_size], "scoring")]
    shares: list[list[dict[str, float]]] = [[] for _ in range(world_size)]
    dist.all_gather_object(shares, mine)
    return [shares[index % world_size][index // world_size] for index in range(len(folders))]


def errors(run: Path) -> list[dict[str, float]]:
    """Distance of rebuilt averages from directly tracked ones, relative to that of the raw weights."""
    widths, raw = rebuilt(run / "rebuilt"), flat_weights(run / "raw")
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
    """Writes quality.png, error.png and samples.png."""
    draw_quality(run / "quality.png", report["widths"], report["raw"])
    draw_error(run / "error.png", report["errors"])
    width, split = best(report, "frechet")["sigma_rel"], load_split()
    few = replace(effort, samples=SHOWN_ROWS * CLASSES)
    sources = {"raw weights": run / "raw", f"same noise, averaged at {width:.0%}": rebuilt(run / "rebuilt")[width]}
    blocks = {name: generate(load_model(run, folder, device), few, device) for name, folder in sources.items()}
    blocks["real digits, held out"] = split.held_out.rows(SHOWN_ROWS)
    draw_samples(run / "samples.png", {name: split.pixels(images.cpu()) for name, images in blocks.items()}, CLASSES)


def main() -> None:
    """Scores every set of weights, each rank its share, and reports on rank 0."""
    run, effort = parse_options()
    with process_group() as device:
        rebuild_tracked(run)
        judge, widths = Judge(load_split(), effort, device), rebuilt(run / "rebuilt")
        raw, *scores = score_all(run, [run / "raw", *widths.values()], judge, device)
        if dist.get_rank() == 0:
            report = {
                "classifier_accuracy": judge.accuracy(),
                "frechet_of_held_out_digits": judge.frechet_of_held_out(),
                "raw": raw,
                "widths": [{"sigma_rel": width, **score} for width, score in zip(widths, scores, strict=True)],
                "errors": errors(run),
            }
            (run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            draw_figures(run, report, effort, device)
            print_tables(report)


if __name__ == "__main__":
    main()
