"""What is written for people: the page of a preview, which loads nothing and escapes all data, and plots."""

from __future__ import annotations

import html
from collections.abc import Iterable
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora_cli.data.rows import count
from qlora_cli.data.view import (
    SPREAD,
    Piece,
    by_part,
    range_in_words,
    source_columns,
    source_figures,
    source_in_words,
    spread_figures,
    spreads,
    visible,
)
from qlora_cli.errors import Exit, UserError

MARK = "<!-- written by qlora preview: it may be overwritten -->"
"""In the beginning of every page, so that no other file is ever overwritten."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fff; --soft: #667; --line: #d9dce1; --trained: #0b6b34;
  --ground: #dff3e4; --token: #e6e8ec }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #15171a; --soft: #9aa0aa; --line: #34383f;
  --trained: #8fe0ab; --ground: #16351f; --token: #2c3037 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem } p, dt, .path { color: var(--soft) }
table { border-collapse: collapse } th, td { padding: .2rem .9rem .2rem 0; text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft) } th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem } dd { margin: 0 }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .8rem; max-width: 40rem;
  font-variant-numeric: tabular-nums } .bars > :nth-child(3n + 1) { text-align: right }
.bar { background: var(--trained); height: 1rem; align-self: center; min-width: 1px } .bar.none { min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .3rem;
  padding: .8rem; font: 14px/1.5 ui-monospace, monospace; color: var(--soft) }
.t { color: var(--trained); background: var(--ground) }
.s { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .2rem; font-size: .85em }
.s:not(.t) { background: var(--token) }
"""


def refuse_foreign(path: Path) -> None:
    """Refuses a place for a page where something else is that we did not write."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(path, what, "name a file in a folder that exists")
    if path.exists():
        with path.open("rb") as file:
            begin = file.read(200)
        if MARK.encode() not in begin:
            raise UserError(path, "is there already, and no page of ours", "name another file", Exit.REFUSED)


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Writes the page of a preview; what is there must be a page of ours."""
    refuse_foreign(path)
    page, aside = preview_page(result).encode(), path.with_name(f".{path.name}.tmp")
    try:
        aside.write_bytes(page)
        aside.replace(path)
    except OSError as error:
        raise UserError(path, f"cannot be written: {error.strerror}", "name another file", Exit.FAILED) from error


def preview_page(result: dict[str, Any]) -> str:
    """The page of what `plan.preview.preview` returns."""
    title = f"{'Training' if result['role'] == 'train' else 'Held-out'} rows for {escaped(result['model'])}"
    statistics = result["statistics"]
    facts = [*result["summary"], *(("note", note) for note in result["notes"])]
    described = "".join(f"<dt>{escaped(label)}</dt><dd>{escaped(text)}</dd>" for label, text in facts)
    parts = [
        f"<h1>{title}</h1>",
        f"<dl>{described}</dl>",
        f"<h2>Sources</h2>{sources(result)}",
        f"<h2>Lengths in tokens</h2>{lengths(statistics)}",
        f"<h2>Tokens of an example</h2>{bars(statistics['histogram'])}",
        "<h2>Examples as the model sees them</h2>",
        '<p><span class="t">trained</span> &ensp; not trained &ensp; <span class="s">special token</span></p>',
        *map(row, result["rows"]),
    ]
    return f"""<!doctype html>
{MARK}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def escaped(text: object) -> str:
    """Text for HTML, with control characters spelled out; half a character, which UTF-8 cannot write, too."""
    return html.escape(visible(str(text))).encode("utf-8", "backslashreplace").decode()


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n" for cells in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>\n{lines}</table>"


def sources(result: dict[str, Any]) -> str:
    """What was read of each source."""
    task = result["task"]
    return table(("", *source_columns(task)), (source_cells(source, task) for source in result["sources"]))


def source_cells(source: dict[str, Any], task: str) -> list[str]:
    """What was read of a source."""
    name = f'{escaped(source["path"])}<br><span class="path">{escaped(source_in_words(source))}</span>'
    return [name, *source_figures(source, task)]


def lengths(statistics: dict[str, Any]) -> str:
    """How the lengths of examples and answers are spread."""
    rows = ([label, *spread_figures(statistics[key])] for label, key in spreads(statistics["task"]))
    return table(("", *SPREAD), rows)


def bars(histogram: list[dict[str, int]]) -> str:
    """The histogram as bars."""
    most = max(one["num_examples"] for one in histogram)
    lines = []
    for one in histogram:
        empty = "" if one["num_examples"] else " none"
        drawn = f'<div class="bar{empty}" style="width: {100 * one["num_examples"] / most:.2f}%"></div>'
        lines.append(f"<div>{range_in_words(one)}</div>{drawn}<div>{one['num_examples']:,}</div>")
    return f'<div class="bars">{"".join(lines)}</div>'


def row(shown: dict[str, Any]) -> str:
    """An example under its place."""
    place = f"{shown['number']:,} &ensp; {escaped(shown['where'])}"
    told = escaped(f"{count(shown['num_tokens'], 'token')}, {shown['learned']}")
    parts = []
    for name, group in by_part([Piece(**one) for one in shown["pieces"]]):
        text = "".join(map(piece, group))
        parts.append((f"<p>{name}</p>" if name else "") + f'\n<pre dir="auto">\n{text}</pre>')
    return f"<h3>{place}</h3><p>{told}</p>{''.join(parts)}"


def piece(part: Piece) -> str:
    """Tokens that follow each other; the ids of a special one in its title."""
    names = " ".join(name for name, wanted in (("t", part.trained), ("s", part.special)) if wanted)
    title = f' title="token {part.ids[0]}"' if part.special else ""
    text = escaped(part.text)
    return f'<span class="{names}"{title}>{text}</span>' if names else text


# ── plots of an inspection and of an arena ───────────────────────────────────────────────────────────────────────────

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
