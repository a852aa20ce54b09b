"""What a person sees of an evaluation: a table for each suite, with intervals and differences, and some answers."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_cli.data.view import visible

SHOWN_GROUPS = 100
"""Groups of a suite that are told, MMLU has 57; the file has all."""


def print_evaluation(result: dict[str, Any]) -> None:
    """The tables, one column for each model and for what each has more than the one before it."""
    console = Console(highlight=False)
    for suite in result["suites"]:
        console.print(suite_table(suite))
        for name, groups in suite["groups"].items():
            for group, figures in list(groups.items())[:SHOWN_GROUPS]:
                rows, *rest = figures.items()
                told = "  ".join(f"{label} {figure(label, value)}" for label, value in rest)
                console.print(f"  {shown(name):<8} {shown(group)}, {rows[1]:,} rows: {told}", soft_wrap=True)
        for note in suite["notes"]:
            console.print(f"note      {shown(note)}", soft_wrap=True)
        file = shown(suite["file"])
        console.print(
            f"file      {file}; answers in {file.removesuffix('.json')}.*.jsonl", "", sep="\n", soft_wrap=True
        )
    names = list(result["models"])
    for sample in result["samples"]:
        console.print(f"prompt    {shown(sample['prompt'])}", soft_wrap=True)
        console.print(f"expected  {shown(sample['expected'])}", soft_wrap=True)
        for name in names:
            console.print(f"{shown(name):<9} {shown(sample[name])}", soft_wrap=True)


def shown(text: str) -> str:
    """A text of a row, a model or a recipe as the console prints it: no markup, nothing that a terminal obeys."""
    return escape(visible(text))


def suite_table(suite: dict[str, Any]) -> Table:
    """The figures of a suite with their 95% intervals."""
    title = f"{shown(suite['name'])}: {suite['rows']:,} rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in suite["models"]:
        table.add_column(shown(name), justify="right")
    for difference in suite["differences"]:
        table.add_column(f"{shown(difference['of'])} - {shown(difference['to'])}", justify="right")
    labels = list(next(iter(suite["models"].values())))
    for label in labels:
        cells = [estimate(label, figures[label]) for figures in suite["models"].values()]
        cells += [estimate(label, difference["figures"][label], True) for difference in suite["differences"]]
        table.add_row(shown(label), *cells)
    return table


def estimate(label: str, found: dict[str, Any], signed: bool = False) -> str:
    """A figure, below it its interval."""
    text = figure(label, found["value"], signed)
    if found.get("low") is None or found.get("high") is None:
        return text
    low, high = (figure(label, found[end], signed).rstrip("%p ") for end in ("low", "high"))
    return f"{text}\n[dim]{low} to {high}[/]"


def figure(label: str, value: float | None, signed: bool = False) -> str:
    """A figure in the unit that people read: shares in percent, differences of them in percentage points."""
    if value is None:
        return "-"
    form = "+" if signed else ""
    label = label.rpartition(".")[2].partition(",")[0]  # of lm_eval's TASK.METRIC,FILTER
    if label in PLAIN:
        return format(value, f"{form}.4f" if abs(value) < 100 else f"{form}.4g")
    if label == "bleu":
        return format(value, f"{form}.1f")
    return f"{100 * value:+.1f} pp" if signed else f"{value:.1%}"


PLAIN = frozenset(
    {"loss", "perplexity", "bits_per_byte", "pearson", "spearman", "matthews"}
    | {"word_perplexity", "byte_perplexity", "brier_score", "mcc"}
)
"""Figures that are no shares."""
