"""Figures: quality against averaging length, error of the rebuilt averages, and samples beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

# From the palette of Okabe and Ito, told apart by colour-blind readers.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
WIDTH = r"$\sigma_\mathrm{rel}$"
TICKS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.26)
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


def draw_quality(path: Path, widths: Sequence[Scores], raw: Scores) -> None:
    """Both scores against the relative width, the raw weights as a line, the best width marked."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        panels = {"frechet": "Fréchet distance of generated digits", "loss": "Denoising loss on held-out digits"}
        for ax, (key, title) in zip(axes, panels.items(), strict=True):
            _draw_curve(ax, [row["sigma_rel"] for row in widths], [row[key] for row in widths], raw[key])
            ax.set(title=title, xlabel=f"averaging length {WIDTH}, % of the run", ylabel="lower is better")
        _save(figure, path)


def _draw_curve(ax: Axes, widths: Sequence[float], values: Sequence[float], raw: float) -> None:
    """One score against the width, which runs on a logarithmic axis."""
    best = min(range(len(values)), key=values.__getitem__)
    low, high = min(values), max(raw, *values)
    ax.axhline(raw, color=GREY, linestyle="--", linewidth=1.5)
    ax.annotate(f"raw weights {raw:#.3g}", (widths[0], raw), (0, -4), textcoords="offset points", va="top", color=GREY)
    ax.plot(widths, values, color=BLUE, marker="o", markersize=4.5)
    ax.scatter(widths[best], values[best], s=90, facecolors="none", edgecolors=ORANGE, linewidths=2, zorder=3)
    label = f"best {values[best]:#.3g}\nat {widths[best]:.0%}"
    ax.annotate(label, (widths[best], values[best]), (0, 10), textcoords="offset points", ha="center", color=ORANGE)
    ax.set_xscale("log")
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))


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
