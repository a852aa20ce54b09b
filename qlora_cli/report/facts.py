"""What a run is and what came of it, in a line and in short tables: its result, its recipe, its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qlora_cli.report.curves import UNITS, on_cpu, points
from qlora_cli.report.page import escaped, table
from qlora_cli.report.reading import RunFiles, number, section

Pairs = Iterator[tuple[str, str]]


def result_line(run: RunFiles) -> str:
    """The held-out loss before and after, with its interval where one was measured; else the loss in training."""
    for place, suite in run.suites.items():
        if told := loss_of(suite["models"]):
            return f"Held-out loss {told}, suite {place}"
    held_out, train = points(run.evaluations, "eval_loss"), points(run.steps, "loss")
    for what, found in (("Held-out loss", held_out), ("Loss in training", train)):
        if len(found) > 1:
            (first, begin), (last, end) = found[0], found[-1]
            return f"{what} {begin:.4g} at step {first:,.0f} → {end:.4g} at step {last:,.0f}"
        if found:
            return f"{what} {found[0][1]:.4g} at step {found[0][0]:,.0f}"
    return "No step was logged yet"


def loss_of(models: dict[str, Any]) -> str:
    """The adapter's loss with its interval, behind that of what training began with; empty where it has none."""
    losses = {name: found.get("loss") for name, found in models.items() if isinstance(found, dict)}
    values = {name: number(found.get("value")) for name, found in losses.items() if isinstance(found, dict)}
    if (after := values.get("adapter")) is None:
        return ""
    before = next((values[name] for name in ("base", "start") if values.get(name) is not None), None)
    low, high = (number((losses["adapter"] or {}).get(name)) for name in ("low", "high"))
    interval = "" if low is None or high is None else f" (95% interval {low:.3g} to {high:.3g})"
    return f"{_if(before, '{:.4g} → ')}{after:.4g}{interval}"


def state(run: RunFiles) -> str:
    """How far the run is."""
    total = number(section(run.facts, "plan").get("steps"))
    of = f" of {total:,.0f}" if total else ""
    if run.finished:
        return f"finished at step {run.last_step:,}{of}"
    return f"not finished: step {run.last_step:,}{of} is the last one logged (it is running, or was stopped)"


def facts(run: RunFiles) -> Pairs:
    """The recipe's main keys, the data, the machine and the versions."""
    model, quantization, adapter = (section(run.recipe, name) for name in ("model", "quantization", "adapter"))
    data, training = section(run.recipe, "data"), section(run.recipe, "training")
    yield "state", state(run)
    yield "model", f"{model.get('name_or_path')}{_if(model.get('revision'), ', revision {}')}, {model.get('task')}"
    double = ", double quantisation" if quantization.get("double_quant") else ""
    dtype = section(run.facts, "base").get("compute_dtype") or quantization.get("compute_dtype")
    kind = quantization.get("data_type")
    stored = "none" if kind == "none" else f"{kind}, blocks of {quantization.get('block_size')}{double}"
    yield "quantisation", f"{stored}; computes in {dtype}"
    yield "adapter", "".join([
        f"r {adapter.get('r')}, alpha {_plain(adapter.get('alpha'))}, dropout {_plain(adapter.get('dropout'))}, on ",
        names(adapter.get("target_modules")), f", init {adapter.get('init')}",
        ", rsLoRA" if adapter.get("use_rslora") else "", ", DoRA" if adapter.get("use_dora") else "",
    ])  # fmt: skip
    yield "training data", trained_on(run, data.get("train"))
    yield "held-out data", held_out(data)
    rate = f"learning rate {training.get('learning_rate')}, {training.get('lr_scheduler')}"
    yield "optimizer", f"{training.get('optimizer')}, {rate}, gradient norm up to {training.get('max_grad_norm')}"
    micro, accumulated = training.get("micro_batch_size"), training.get("gradient_accumulation_steps")
    length = training.get("max_steps")
    span = f"{length:,} steps" if isinstance(length, int) else f"{_plain(training.get('epochs'))} epochs"
    yield "batch", f"{micro} rows × {accumulated} accumulated, up to {data.get('max_length')} tokens each; {span}"
    yield "seed", f"{training.get('seed')}{', deterministic kernels' if training.get('deterministic') else ''}"
    yield from machine(run)


def machine(run: RunFiles) -> Pairs:
    """Device, date and versions, as run.json has them."""
    found = run.facts
    if not found:
        return
    yield "device", str(found.get("device"))
    yield "begun", str(found.get("date"))
    packages = found.get("packages")
    told = [f"{name} {version}" for name, version in packages.items()] if isinstance(packages, dict) else []
    yield "versions", ", ".join([f"qlora {found.get('qlora')}", f"Python {found.get('python')}", *told])
    digests = found.get("fingerprints")
    if isinstance(digests, dict):
        yield "fingerprints", ", ".join(f"{name} {str(value)[:12]}" for name, value in digests.items())


def trained_on(run: RunFiles, sources: Any) -> str:
    """Where the rows are from, how many there are and how many tokens of them are trained."""
    data = run.facts.get("data")
    if not isinstance(data, dict):
        return paths(sources)
    rows, tokens = number(data.get("rows")), number(data.get("trained_tokens"))
    return f"{paths(sources)}{_if(rows, ': {:,.0f} rows')}{_if(tokens, ', {:,.0f} trained tokens')}"


def held_out(data: dict[str, Any]) -> str:
    """Which rows are held out."""
    if data.get("eval"):
        return paths(data["eval"])
    fraction = data.get("eval_fraction")
    return f"{fraction:.1%} of the training rows" if isinstance(fraction, float) and fraction else "none"


def plan_table(run: RunFiles) -> str:
    """What was planned beside what came, as a table with notes below it; HTML."""
    rows, notes = [*plan_rows(run)], [*plan_notes(run)]
    told = "".join(f"<p>{escaped(note)}</p>" for note in notes)
    return table(("", "planned", "came"), [[escaped(cell) for cell in row] for row in rows], named=True) + told


def plan_rows(run: RunFiles) -> Iterator[Sequence[str]]:
    """A name, what was planned of it, what came; a dash where nobody knows."""
    plan = section(run.facts, "plan")
    training, data = section(run.recipe, "training"), section(run.facts, "data")
    steps, done = number(plan.get("steps")), run.last_step
    yield "optimizer steps", "–" if steps is None else f"{steps:,.0f}", f"{done:,}"
    epochs = points(run.steps, "epoch")
    wanted = number(training.get("epochs")) if training.get("max_steps") is None else None
    yield "passes over the data", _if(wanted, "{:,.4g}") or "–", f"{epochs[-1][1]:,.4g}" if epochs else "–"
    tokens = number(data.get("trained_tokens"))
    if tokens and epochs:
        planned = None if wanted is None else wanted * tokens
        yield "trained tokens", _if(planned, "{:,.0f}") or "–", f"{tokens * epochs[-1][1]:,.0f}"
    taken = [value for _, value in points(run.steps, "memory_bytes")]
    planned_bytes = number(plan.get("memory_bytes"))
    yield "peak memory", size(planned_bytes) if planned_bytes else "–", size(max(taken)) if taken else "–"
    if number(plan.get("layers")):
        yield "layers recomputed", f"{plan.get('layers_recomputed')} of {plan['layers']}", "–"
    speeds = [value for _, value in points(run.steps, "trained_tokens_per_s")]
    yield "trained tokens per second, median", "–", f"{median(speeds):,.0f}" if speeds else "–"
    seconds = training_seconds(run)
    yield "time in steps", "–", "–" if seconds is None else duration(seconds)


def plan_notes(run: RunFiles) -> Iterator[str]:
    """What must be known to read the table."""
    plan = section(run.facts, "plan")
    if not plan:
        yield "This run stored no plan: it was begun by an earlier version."
    elif plan.get("memory_bytes") is None:
        yield "Memory was not planned: the recipe says how many layers are recomputed, or nothing could be rehearsed."
    elif on_cpu(run):
        yield "On a CPU the plan counts tensors; measured is all of the process, Python and its libraries with it."
    else:
        yield "Planned is what the allocator holds at the peak; measured is what tensors took of it."
    if training_seconds(run) is not None:
        yield "The time is that of the logged steps by their speed, without loading, evaluations and what was repeated."


def training_seconds(run: RunFiles) -> float | None:
    """Time in optimizer steps: of each logged stretch its trained tokens over its speed. None where that is unknown."""
    tokens = number(section(run.facts, "data").get("trained_tokens"))
    if not tokens:
        return None
    total = before = 0.0
    for line in run.steps:
        epoch, speed = number(line.get("epoch")), number(line.get("trained_tokens_per_s"))
        if epoch is None or not speed:
            return None
        total, before = total + max(0.0, epoch - before) * tokens / speed, epoch
    return number(total) or None


def paths(sources: Any) -> str:
    """The names of data sources, without their folders."""
    found = [one for one in sources or () if isinstance(one, dict)] if isinstance(sources, list) else []
    return ", ".join(Path(str(one.get("path"))).name or str(one.get("path")) for one in found) or "none"


def names(value: Any) -> str:
    """A name, or names behind each other."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def size(num_bytes: float) -> str:
    """Bytes with three digits: 1.47 GB."""
    unit, name = next((pair for pair in UNITS if num_bytes >= pair[0]), UNITS[-1])
    return f"{num_bytes / unit:.3g} {name}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest of them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"


def _if(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
