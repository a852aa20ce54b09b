"""The charts of a run: what training logged over its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_cli.report.charts import Chart, Kind, Point, Series, smoothed
from qlora_cli.report.reading import RunFiles, number, section

SMOOTHED_FROM = 60
"""What was logged so many times is shown as a mean too, over a 25th of them."""

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))

SHARES = ("accuracy", "exact_match", "f1", "json_equal", "json_valid", "gsm8k")
"""What names of figures from 0 to 1 end with, in the order in which they are preferred."""


def charts(run: RunFiles) -> list[Chart]:
    """Loss, learning rate, gradient norm, memory, speed and figures of evaluations, as far as they were logged."""
    measured = tuple(shares(run))
    found = [
        Chart("loss", "Loss", loss_unit(run), tuple(losses(run))),
        Chart("rate", "Learning rate", "learning rate", rate(run), from_zero=True),
        Chart("norm", "Gradient norm, before clipping", "norm", one_of(run, "grad_norm", "norm")),
        memory(run),
        Chart("speed", "Speed", "trained tokens/s", one_of(run, "trained_tokens_per_s", "speed"), from_zero=True),
        Chart("shares", "Evaluations in training", share_unit(measured), measured, from_zero=True),
    ]
    return [chart for chart in found if chart.series]


def share_unit(measured: Sequence[Series]) -> str:
    """What the axis of shares is called: one line has no legend."""
    return f"{measured[0].name}, share" if len(measured) == 1 else "share"


def loss_unit(run: RunFiles) -> str:
    """What a loss is measured in."""
    task = section(run.recipe, "model").get("task")
    return "nats per token" if task in ("causal_lm", "seq2seq_lm") else "loss"


def points(lines: Sequence[dict[str, Any]], name: str, unit: float = 1.0) -> list[Point]:
    """A figure over the steps, in multiples of `unit`; what is no finite number is left out."""
    values = ((float(line["step"]), number(line.get(name))) for line in lines)
    return [(step, value / unit) for step, value in values if value is not None]


def one_of(run: RunFiles, name: str, words: str) -> tuple[Series, ...]:
    """A figure of training as lines of its own; none where it was never logged."""
    return (*with_mean(words, points(run.steps, name)),)


def with_mean(name: str, found: list[Point]) -> Iterator[Series]:
    """A line, where it has many points behind that of its mean; none without a point."""
    if len(found) >= SMOOTHED_FROM:
        yield Series(name, found, "faint")
        yield Series(f"{name}, mean", smoothed(found, len(found) // 25))
    elif found:
        yield Series(name, found)


def rate(run: RunFiles) -> tuple[Series, ...]:
    """The learning rate, which is as smooth as its schedule."""
    found = points(run.steps, "learning_rate")
    return (Series("learning rate", found),) if found else ()


def losses(run: RunFiles) -> Iterator[Series]:
    """The loss in training, its mean where there are many, and the held-out loss."""
    train, held_out = points(run.steps, "loss"), points(run.evaluations, "eval_loss")
    yield from with_mean("train", train)
    if held_out:
        yield Series("held-out", held_out, "second", dots=True)


def memory(run: RunFiles) -> Chart:
    """The peak so far; on a GPU beside what was planned, which on a CPU counts tensors only."""
    top = max((value for _, value in points(run.steps, "memory_bytes")), default=1.0)
    size, unit = next((pair for pair in UNITS if top >= pair[0]), UNITS[-1])
    taken = points(run.steps, "memory_bytes", size)
    series = [Series("measured", taken)] if taken else []
    planned = number(section(run.facts, "plan").get("memory_bytes"))
    if taken and planned and not on_cpu(run):
        ends = [(0.0, planned / size), (taken[-1][0], planned / size)]
        series.append(Series("planned", ends, "limit"))
    return Chart(
        "memory", f"Peak memory, {'of the process' if on_cpu(run) else 'of the GPU'}", unit, tuple(series), True
    )


def on_cpu(run: RunFiles) -> bool:
    """Whether it was trained on a CPU."""
    return str(run.facts.get("device", "cpu")).startswith("cpu")


def shares(run: RunFiles) -> Iterator[Series]:
    """Up to two figures of evaluations that are shares: the one that chooses the best adapter, and the first other."""
    best = section(run.recipe, "evaluation").get("best_metric")
    names = dict.fromkeys(name for line in run.evaluations for name in line if name.endswith(SHARES))
    first = [name for name in names if name == best]
    chosen = [*first, *(name for name in names if name != best)][:2]
    kinds: tuple[Kind, Kind] = ("main", "second")
    for name, kind in zip(chosen, kinds, strict=False):
        if found := points(run.evaluations, name):
            yield Series(name.removeprefix("eval_").replace("_", " "), found, kind, dots=True)
