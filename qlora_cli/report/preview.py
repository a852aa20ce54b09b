"""The page of a preview: rows as the model sees them, and what an epoch costs."""

from __future__ import annotations

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
)
from qlora_cli.report.page import document, escaped, refuse_strange, table, write_whole

MARK = "<!-- written by qlora preview: it may be overwritten -->"
"""In the beginning of every page, so that no other file is ever overwritten."""

STYLE = """
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .8rem; max-width: 40rem;
  font-variant-numeric: tabular-nums } .bars > :nth-child(3n + 1) { text-align: right }
.bar { background: var(--trained); height: 1rem; align-self: center; min-width: 1px } .bar.none { min-width: 0 }
.t { color: var(--trained); background: var(--ground) }
.s { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .2rem; font-size: .85em }
.s:not(.t) { background: var(--token) }
@media print { .bar, .t, .s { print-color-adjust: exact } .t { font-weight: 600 } }
"""


def refuse_foreign(path: Path) -> None:
    """Refuses a place for a page where something else is that we did not write."""
    refuse_strange(path, MARK.encode())


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Writes the page of a preview; what is there must be a page of ours."""
    refuse_foreign(path)
    write_whole(path, preview_page(result).encode())


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
    return document(MARK, title, STYLE, parts)


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
