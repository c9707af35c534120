"""Canvas: an empty figure, its looks, and the file that it becomes. Without pyplot, so that nothing global changes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_phema.errors import OutputError

__all__ = [
    "BEST",
    "GREY",
    "WIDTH",
    "blank",
    "check_picture",
    "colour",
    "legend",
    "literal",
    "mark",
    "save",
    "svg_bytes",
    "width_axis",
]

KINDS = (".png", ".pdf", ".svg")
WIDTH = r"averaging length $\sigma_\mathrm{rel}$"
# From the palette of Okabe and Ito, told apart by colour-blind readers.
BEST, GREY = "#D55E00", "#767676"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C564B", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_TICKS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.28)


def colour(number: int) -> str:
    """Colour of one of several things, from 0; they repeat after seven."""
    return _COLOURS[number % len(_COLOURS)]


def mark(number: int) -> str:
    """Marker of one of several things, from 0; with the colour, they repeat after 56."""
    return _MARKS[number % len(_MARKS)]


def blank(rows: int, columns: int = 1, *, size: tuple[float, float] = (8.0, 3.2), **options: Any) -> tuple[Any, Any]:
    """A figure with empty axes.

    Args:
        rows: Of axes.
        columns: Of axes.
        size: Width of the figure and height of one row, in inches.
        options: Of ``Figure.subplots``.

    Returns:
        The figure, and its axes as an array (rows, columns).

    Raises:
        OutputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise OutputError("drawing needs matplotlib", hint="pip install 'sharded-phema[plot]'") from error
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(size[0], 0.5 + size[1] * rows), layout=layout, dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(visible=True, color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10.5)
    return figure, grid


def width_axis(axes: Any, widths: Sequence[float] | NDArray[np.float64], *, along: str = "x") -> None:
    """Make one axis that of relative widths: logarithmic, with ticks where people look for them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set(**{f"{along}scale": "log", f"{along}label": WIDTH})
    ticks = [tick for tick in _TICKS if 0.99 * min(widths) <= tick <= 1.01 * max(widths)]
    axis = getattr(axes, f"{along}axis")
    axis.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def literal(text: str, limit: int = 48) -> str:
    """A text that others wrote, as a label: no formula, one line, shortened in its middle, and never hidden."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(line) > limit:
        line = f"{line[: limit - limit // 3 - 1]}…{line[-(limit // 3) :]}"
    # Labels that begin with an underscore are left out of legends.
    return (" " if line.startswith("_") else "") + line.replace("$", r"\$")


def legend(axes: Any, *, outside: bool = False, title: str = "") -> None:
    """What each labelled thing is; beside the axes where there is much of it."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if outside else {}
    axes.legend(
        handles, labels, title=title or None, fontsize=8.5, title_fontsize=8.5, frameon=outside is False, **place
    )


def check_picture(out: Path) -> None:
    """Prove that a file name says which kind of picture is wanted.

    Raises:
        OutputError: It does not.
    """
    if out.suffix.lower() not in KINDS:
        raise OutputError(f"{out}: expected a name that ends in one of {', '.join(KINDS)}", hint="try --out plot.png")


def save(figure: Any, out: Path) -> None:
    """Write a figure as its file's name says.

    Raises:
        OutputError: The name says no known kind, or the file cannot be written.
    """
    check_picture(out)
    try:
        figure.savefig(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}", hint="check the folder and its permissions") from error


def svg_bytes(figure: Any) -> bytes:
    """The figure as SVG; the same bytes for the same figure."""
    import matplotlib

    buffer = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sharded_phema", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
