"""Figures: error of the rebuilt averages, and samples beside each other. Quality is drawn by ``sharded-phema plot``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

# From the palette of Okabe and Ito, told apart by colour-blind readers.
BLUE, ORANGE = "#0072B2", "#D55E00"
WIDTH = r"$\sigma_\mathrm{rel}$"
Scores = Mapping[str, float]
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "figure.constrained_layout.w_pad": 0.1,
    "savefig.dpi": 150,
}


def draw_error(path: Path, rows: Sequence[Scores]) -> None:
    """Error of rebuilt averages beside what was forecast without knowing them."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for offset, label, colour, hatch in ((-0.2, "measured", BLUE, ""), (0.2, "forecast", ORANGE, "//")):
            places, values = [index + offset for index in range(len(rows))], [row[label] for row in rows]
            bars = ax.bar(places, values, 0.36, color=colour, label=label, hatch=hatch, edgecolor="white")
            ax.bar_label(bars, [f"{100 * value:#.2g}" for value in values], padding=2)
        ax.set_xticks(range(len(rows)), [f"{row['sigma_rel']:.0%}" for row in rows])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        ax.grid(visible=False, axis="x")
        ax.set(title="Error of rebuilt averages against directly tracked ones", xlabel=f"averaging length {WIDTH}")
        ax.set_ylabel("‖rebuilt − tracked‖,\n% of ‖raw − tracked‖")
        ax.margins(y=0.15)
        ax.legend(frameon=False)
        _save(figure, path)


def draw_samples(path: Path, blocks: Mapping[str, Tensor], columns: int) -> None:
    """Blocks of images side by side, each titled; images are (count, 1, height, width), 0 for paper to 1 for ink."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, len(blocks), figsize=(9, 2.0), layout="constrained")
        for ax, (title, images) in zip(axes, blocks.items(), strict=True):
            ax.imshow(_tiled(images, columns), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(title)
            ax.set_axis_off()
        _save(figure, path)


def _tiled(images: Tensor, columns: int) -> Tensor:
    """One large image of all the images, row by row, with a white pixel between them."""
    padded = images.new_zeros(len(images), images.shape[2] + 1, images.shape[3] + 1)
    padded[:, :-1, :-1] = images[:, 0]
    return padded.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
