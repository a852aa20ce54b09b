"""Plots of an inspection and of an arena, which matplotlib draws."""

from __future__ import annotations

from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError

PLOTS = (".png", ".svg")
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "x"), ("--", "v"), ("-.", "+"))
"""Line and marker of each data type, in turn: they are told apart without colours too."""

MOST_NAMES = 60
"""So many layers are named below a plot; of more every second, third, ..."""


def check_plot(path: Path) -> None:
    """Refuses, before any work is done, a plot that could not be written: nothing is overwritten."""
    if path.suffix.lower() not in PLOTS:
        raise UserError(path, "no plot has this ending", f"end the name in {' or '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise UserError(path, f"there is no folder {path.parent}", "name a file in a folder that exists")
    if path.exists():
        raise UserError(path, "is there already, and nothing is overwritten", "name another file", Exit.REFUSED)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        todo = "run `pip install 'qlora[plot]'`"
        raise UserError("--plot", "matplotlib draws it, and is not installed", todo, Exit.ENVIRONMENT) from None


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Draws the error by layer, a line per data type, of what `plan.inspect.inspect` returns; a PNG or an SVG."""
    write_figure(path, error_plot(result))


def write_arena(path: Path, result: dict[str, Any]) -> None:
    """Draws ratings and percentages with their intervals, of what `evaluate.arena.arena` returns; a PNG or an SVG."""
    write_figure(path, arena_plot(result))


def write_figure(path: Path, figure: Any) -> None:
    """Writes matplotlib's figure into a new file, in the format of its ending."""
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight")
    try:
        with path.open("xb") as file:
            file.write(drawn.getvalue())
    except OSError as error:
        raise UserError(path, f"cannot be written: {error.strerror}", "name another file", Exit.FAILED) from error


def error_plot(result: dict[str, Any]) -> Any:
    """matplotlib's figure: layers in the model's order, relative errors on a logarithmic axis."""
    from matplotlib.figure import Figure

    layers = result["layers"]
    figure = Figure(figsize=(min(24, 4 + 0.2 * len(layers)), 5))
    axes = figure.subplots()
    for (kind, total), (line, marker) in zip(result["types"].items(), cycle(LINES), strict=False):
        errors = [layer["types"][kind]["error"] for layer in layers]
        label = f"{kind}, {total['bits']:.2f} bits: {total['error']:.4f}"
        axes.plot(errors, line, marker=marker, markersize=4, linewidth=1, label=label)
    every = -(-len(layers) // MOST_NAMES)
    named = [*range(0, len(layers), every)]
    axes.set_xticks(named, [layers[at]["name"] for at in named], rotation=90, fontsize=6)
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("relative error ‖W − Q‖ / ‖W‖")
    axes.set_title(f"{Path(result['model']).name}: error by layer", parse_math=False)
    axes.grid(axis="y", which="both", linewidth=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def arena_plot(result: dict[str, Any]) -> Any:
    """matplotlib's figure: best on top; Elo with the middle 95% of the orders, percentages with their interval."""
    from matplotlib.figure import Figure

    elo, percent = result["elo"], result["percent"]
    panels = [(f"Elo, 95% of {elo['orders']:,} orders", [bar_of_elo(row) for row in elo["models"]])]
    if percent:
        label = f"score in percent of {percent['reference']}'s, 95% interval"
        panels.append((label, [(row["model"], row["percent"], *2 * [row["ci95"] or 0]) for row in percent["models"]]))
    most = max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(6 * len(panels), 1 + 0.35 * most), layout="constrained")
    for axes, (label, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names, middles, below, above = zip(*rows, strict=True)
        at = range(len(rows))
        axes.errorbar(middles, at, xerr=(below, above), fmt="o", markersize=4, linewidth=1, capsize=3, color="black")
        axes.set_yticks(at, names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(label, parse_math=False)
        axes.grid(axis="x", linewidth=0.3)
    return figure


def bar_of_elo(row: dict[str, Any]) -> tuple[str, float, float, float]:
    """A model's name, its rating, and how far the range reaches below and above it."""
    return row["model"], row["elo"], row["elo"] - row["low"], row["high"] - row["elo"]
