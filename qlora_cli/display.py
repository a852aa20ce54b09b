"""What a person sees: a live line on a terminal, plain lines when piped. Progress on stderr, results on stdout."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def make_report(quiet: bool = False) -> PlainReport | LiveReport | QuietReport:
    """The report that fits stderr: live on a terminal, plain lines when piped; quiet for all but the main process."""
    if quiet:
        return QuietReport()
    return LiveReport() if sys.stderr.isatty() else PlainReport()


class QuietReport:
    """Says nothing: the processes beside the main one."""

    def say(self, text: str) -> None:
        pass

    def begin(self, step: int, total_steps: int) -> None:
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

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.say(f"train    from step {step} to {total_steps}")

    def metrics(self, values: dict[str, Any]) -> None:
        self.say(metrics_line(values, self.total_steps))


class LiveReport(QuietReport):
    """A progress bar with the latest figures; other lines scroll above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.total_steps = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def begin(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.task = self.bar.add_task("train", total=total_steps, completed=step, figures="")
        self.bar.start()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def metrics(self, values: dict[str, Any]) -> None:
        if "loss" in values:
            self.bar.update(self.task, figures=figures(values))
        self.say(metrics_line(values, self.total_steps))

    def end(self) -> None:
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
    return (
        f"{step}  held-out loss {values['eval_loss']:.4f}  perplexity {values['eval_perplexity']:.4g}  "
        f"token accuracy {values['eval_token_accuracy']:.1%}"
    )


def print_evaluation(result: dict[str, Any]) -> None:
    """The table of an evaluation, one column per model, and a sample answer."""
    console = Console(highlight=False)
    table = Table(title=f"held-out: {result['rows']:,} rows, {result['tokens']:,} trained tokens", title_justify="left")
    table.add_column("")
    for name in result["models"]:
        table.add_column(name, justify="right")
    for label, key, form in METRICS:
        if all(key in model for model in result["models"].values()):
            table.add_row(label, *(format(model[key], form) for model in result["models"].values()))
    console.print(table)
    for sample in result["samples"]:
        console.print(f"prompt    {escape(sample['prompt'])}", soft_wrap=True)
        console.print(f"expected  {escape(sample['expected'])}", soft_wrap=True)
        for name in result["models"]:
            console.print(f"{name:<9} {escape(sample[name])}", soft_wrap=True)


METRICS = (
    ("loss (nats per token)", "loss", ".4f"),
    ("perplexity", "perplexity", ".4g"),
    ("token accuracy", "token_accuracy", ".1%"),
    ("exact match", "exact_match", ".1%"),
)
"""Rows of the evaluation table: label, key, format."""


def print_merge(result: dict[str, Any]) -> None:
    """What a merge wrote, and how far it is from the unmerged model."""
    console = Console(highlight=False)
    difference = result["difference"]
    console.print(
        f"merged   {result['out']}  ({result['dtype']}, onto the {result['base']} base, {result['seconds']:.1f} s)",
        soft_wrap=True,
    )
    console.print(
        f"against the unmerged model over {difference['positions']} positions: largest logit difference "
        f"{difference['max_abs']:.2e}, mean KL {difference['mean_kl']:.2e} nats, "
        f"same top token {difference['top1_agreement']:.2%}",
        soft_wrap=True,
    )
