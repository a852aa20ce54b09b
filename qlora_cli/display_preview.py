"""A preview on a terminal or in a pipe: rows as the model sees them, then tables; or every bad row."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_cli.data.rows import count
from qlora_cli.data.view import (
    LEGEND,
    MARKS,
    SPREAD,
    Marks,
    Piece,
    bar,
    by_part,
    end_of,
    marked,
    range_in_words,
    shortened,
    source_columns,
    source_figures,
    source_in_words,
    spread_figures,
    spreads,
    text_of_part,
    visible,
)
from qlora_cli.display import figures_table
from qlora_cli.errors import UserError


def print_preview(result: dict[str, Any], console: Console | None = None) -> None:
    """Rows as the model sees them, then the tables: trained tokens in colour, or between marks without a terminal."""
    console = console or Console(highlight=False)
    marks = None if console.color_system else MARKS[_draws(console)]
    for row in result["rows"]:
        print_row(console, row, result["whole"], marks)
    if result["whole"]:
        return
    if result["rows"]:
        console.print(as_text(LEGEND, marks), "", sep="\n")
    for table in (sources_table(result, console.width), lengths_table(result["statistics"])):
        console.print(table, "")
    print_histogram(console, result["statistics"])
    for label, text in [*result["summary"], *(("note", note) for note in result["notes"])]:
        lines = wrap(visible(text), console.width - 11, break_long_words=False, break_on_hyphens=False)
        console.print(Text(f"{label:<11}" + f"\n{'':<11}".join(lines)), soft_wrap=True)


def _draws(console: Console) -> bool:
    """Whether the output takes more than ASCII."""
    return console.encoding.startswith("utf")


def print_row(console: Console, row: dict[str, Any], whole: bool, marks: Marks | None) -> None:
    """One example under its place; long texts lose their middle unless `whole` is wanted."""
    pieces = [Piece(**piece) for piece in row["pieces"]]
    parts = pieces if whole else shortened(pieces)
    told = f"{count(row['num_tokens'], 'token')}, {visible(row['learned'])}"
    if len(parts) > len(pieces) or any(part.num_cut for part in parts):
        told += f"; shortened, --row {row['number']} shows it whole"
    console.print(Text(f"{row['number']}  {visible(row['where'])}", style="bold"), soft_wrap=True)
    console.print(Text(f"   {told}", style="dim"), soft_wrap=True)
    console.print()
    for name, group in by_part(parts):
        if name:
            console.print(Text(f"   {name}", style="dim"))
        if marks is None:
            console.print(Padding(as_text(group, None), (0, 0, 1, 3), expand=False))
        else:
            console.print(as_text(group, marks), "", sep="\n", soft_wrap=True)


def as_text(parts: Sequence[Piece], marks: Marks | None) -> Text:
    """A row with the marks, or in colours without them."""
    if marks:
        return Text(marked(parts, marks))
    text = Text()
    for part in parts:
        style = "yellow" if part.num_cut else "bold green" if part.trained else "dim"
        text.append(text_of_part(part), style + (" reverse" if part.special else ""))
    return text


def sources_table(result: dict[str, Any], width: int) -> Table:
    """What was read of each source, with its format; a long path loses its beginning."""
    names = source_columns(result["task"])
    cells = [source_figures(source, result["task"]) for source in result["sources"]]
    taken = sum(max(map(len, column)) + 2 for column in zip(names, *cells, strict=True))
    table = figures_table(result["role"], names)
    for source, numbers in zip(result["sources"], cells, strict=True):
        path = end_of(visible(source["path"]), width - taken)
        table.add_row(Text.assemble(path, (f"\n{visible(source_in_words(source))}", "dim")), *numbers)
    return table


def lengths_table(statistics: dict[str, Any]) -> Table:
    """How the lengths of examples and answers are spread."""
    table = figures_table("tokens", SPREAD)
    for label, key in spreads(statistics["task"]):
        table.add_row(label, *spread_figures(statistics[key]))
    return table


def print_histogram(console: Console, statistics: dict[str, Any]) -> None:
    """The lengths as bars, at most 60 columns wide."""
    bins = statistics["histogram"]
    most = max(one["num_examples"] for one in bins)
    labels = [range_in_words(one) for one in bins]
    counts = [f"{one['num_examples']:,}" for one in bins]
    across = max(5, *map(len, labels)), max(map(len, counts))
    room = min(console.width, 60) - sum(across) - 5
    console.print(Text(f"{'tokens':>{across[0] + 1}}  examples", style="bold"))
    for label, number, one in zip(labels, counts, bins, strict=True):
        drawn = bar(one["num_examples"] / most * room, _draws(console))
        console.print(f" {label:>{across[0]}}  [green]{drawn:<{room}}[/]  {number:>{across[1]}}")
    console.print()


def print_bad_rows(result: dict[str, Any]) -> None:
    """Every bad row on a line, as an error would tell it, and how many there are."""
    for problem in result["problems"]:
        print(visible(str(UserError(**problem))))
    if more := result["num_bad"] - result["num_listed"]:
        print(f"... and {count(more, 'more bad row')}")
    if result["num_bad"] or not result["problems"]:
        print(f"{result['role']}: {result['num_bad']:,} of {count(result['num_rows'], 'row')} bad")
