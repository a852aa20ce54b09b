"""What a person sees: a live line on a terminal, plain lines when piped. Progress on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qlora_cli.data.rows import count
from qlora_cli.data.view import (
    visible,
)
from qlora_cli.errors import UserError


def make_report(quiet: bool = False) -> PlainReport | LiveReport | QuietReport:
    """The report that fits stderr: live on a terminal, plain lines when piped; quiet for all but the main process."""
    if quiet:
        return QuietReport()
    return LiveReport() if sys.stderr.isatty() else PlainReport()


class QuietReport:
    """Says nothing: the processes beside the main one."""

    def say(self, text: str) -> None:
        pass

    def prepared(self, role: str, num_rows: int) -> None:
        pass

    def begin(self, step: int, total_steps: int) -> None:
        pass

    def measure(self, name: str, num_rows: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def metrics(self, values: dict[str, Any]) -> None:
        pass

    def end(self) -> None:
        pass


class PlainReport(QuietReport):
    """One plain line for each thing worth telling."""

    total_steps = 0
    told = 0.0  # when progress was last told

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def prepared(self, role: str, num_rows: int) -> None:
        if time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            self.say(f"{role:<8} {num_rows:,} rows prepared")

    def begin(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.say(f"train    from step {step} to {total_steps}")

    def measure(self, name: str, num_rows: int) -> None:
        self.say(f"eval     {name}: {count(num_rows, 'row')}")

    def metrics(self, values: dict[str, Any]) -> None:
        self.say(metrics_line(values, self.total_steps))


class LiveReport(QuietReport):
    """A progress bar; lines scroll above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.total_steps = 0
        self.status = self.console.status("")
        self.bar = self.new_bar()

    def new_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def say(self, text: str) -> None:
        self.status.stop()
        self.console.print(escape(text), soft_wrap=True)

    def prepared(self, role: str, num_rows: int) -> None:
        self.status.update(f"{role:<8} {num_rows:,} rows prepared")
        self.status.start()

    def begin(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.task = self.bar.add_task("train", total=total_steps, completed=step)
        self.bar.start()

    def measure(self, name: str, num_rows: int) -> None:
        self.bar = self.new_bar()
        self.task = self.bar.add_task(f"eval {name}", total=num_rows)
        self.bar.start()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def metrics(self, values: dict[str, Any]) -> None:
        self.say(metrics_line(values, self.total_steps))

    def end(self) -> None:
        self.status.stop()
        self.bar.stop()


def figures(values: dict[str, Any]) -> str:
    """Loss, learning rate, speed and memory in a few characters."""
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"{values['trained_tokens_per_s']:,.0f} tok/s  {values['memory_bytes'] / 1e9:.1f} GB"
    )


def metrics_line(values: dict[str, Any], total_steps: int) -> str:
    """One line for a set of metrics, of training or of an evaluation."""
    step = f"step {values['step']:>{len(str(total_steps))}}/{total_steps}"
    if "loss" in values:
        return f"{step}  {figures(values)}  grad {values['grad_norm']:.3f}"
    found = {name: value for name, value in values.items() if name not in ("step", "eval_rows")}
    told = [f"{LABELS.get(name, name)} {value:{form_of(name)}}" for name, value in found.items()]
    return f"{step}  " + "  ".join(told)


LABELS = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "eval_token_accuracy": "token accuracy"}
"""What figures of an evaluation in training are called."""


def form_of(name: str) -> str:
    """The format of a figure of an evaluation in training."""
    if name.endswith("accuracy"):
        return ".1%"
    return ".4g" if name.endswith("perplexity") else ".4f"


def print_quantized(result: dict[str, Any]) -> None:
    """Where the base was stored."""
    Console(highlight=False).print(f"{result['out']}  ({result['bytes']:,} bytes of weights)", soft_wrap=True)


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────────

FIGURES = (
    ("bits", "bits", 1, ".3f"),
    ("error", "error", 1, ".4f"),
    ("quantise", "quantize_weights_per_s", 1e9, ".2g"),
    ("dequantise", "dequantize_weights_per_s", 1e9, ".2g"),
    ("perplexity", "perplexity", 1, ".4g"),
)
"""Columns of an inspection: heading, key, unit, format. Those without any figure are left out."""


def print_inspection(result: dict[str, Any], layers: bool) -> None:
    """What each data type makes of a model, in total; with `layers` layer by layer first."""
    console = Console(highlight=False)
    types = result["types"]
    if layers:
        console.print(inspection_table("layer", {layer["name"]: layer["types"] for layer in result["layers"]}), "")
    for line in result["summary"]:
        console.print(Text(visible(line)), soft_wrap=True)
    console.print("", inspection_table("type", {"": types}), "", sep="\n")
    console.print("largest error")
    for kind, total in types.items():
        console.print(f" {kind:<5} {total['worst']['error']:.4f}  {total['worst']['layer']}", soft_wrap=True)
    for one in result["left_out"]:
        console.print(Text(f"left out  {visible(str(UserError(**one)))}"), soft_wrap=True)


def inspection_table(first: str, groups: dict[str, dict[str, Any]]) -> Table:
    """The figures of every data type, in each group under its name."""
    known = [figures for types in groups.values() for figures in types.values()]
    columns = [column for column in FIGURES if any(figures.get(column[1]) is not None for figures in known)]
    table = figures_table(first, [heading for heading, *_ in columns])
    for name, types in groups.items():
        if name:
            table.add_row(name)
        for kind, figures in types.items():
            told = [(figures.get(key), unit, form) for _, key, unit, form in columns]
            cells = ["-" if value is None else format(value / unit, form) for value, unit, form in told]
            table.add_row(f"  {kind}" if name else kind, *cells)
    return table


def figures_table(first: str, names: Sequence[str]) -> Table:
    """An empty table with a column of words and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
