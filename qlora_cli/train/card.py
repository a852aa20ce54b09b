"""The part of a model card that is made of a run's own files: results, certificate, data, recipe, versions.

It stands between two marks in README.md and is written anew after an evaluation or a merge. What people write around it
stays, and where they have deleted the marks nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.model.source import read_json
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.dump import to_yaml
from qlora_cli.train.run import Run, read_facts

BEGIN, END = "<!-- qlora: written anew after an evaluation or a merge -->", "<!-- qlora: end -->"
CARD = "README.md"
MERGED = "merge.json"
"""In a merged folder: what was merged, and the certificate."""


def with_place(card: str) -> str:
    """A card with the place for the run's own part at its end, empty."""
    return f"{card.rstrip()}\n\n{BEGIN}\n{END}\n"


def refresh(folder: Path, run: Run, recipe: Recipe, merge: dict[str, Any] | None = None) -> None:
    """Writes the run's part of the card in an adapter's or a merged folder anew; a card without the marks stays.

    merge: merge.json of a merged folder; None for that of the run's own, if it has one.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        replace_text(path, f"{before}{BEGIN}\n{part(run, recipe, merge)}\n{END}{after}")


def part(run: Run, recipe: Recipe, merge: dict[str, Any] | None) -> str:
    """The run's part of a card, in Markdown."""
    facts = read_facts(run) or {}
    sections = {
        "Results": results(run),
        "Merged": certificate(merge or merge_of(run)),
        "Data": data(facts, recipe),
        "Recipe": f"Keys that are not at their defaults; of paths the last part.\n\n```yaml\n{keys(recipe)}```",
        "Versions": ", ".join(f"{name} {found}" for name, found in versions(facts)),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)


def merge_of(run: Run) -> dict[str, Any] | None:
    """merge.json in the run's own merged folder."""
    path = run.folder / "merged" / MERGED
    return read_json(path, "it says what was merged") if path.is_file() else None


def results(run: Run) -> str:
    """The figures of every suite, or the last held-out figures of training."""
    suites = [read_json(path, "it holds a suite's figures") for path in sorted(run.evaluations.glob("*.json"))]
    if suites:
        return "\n\n".join(map(suite_table, suites)) + "\n\nIn brackets 95% intervals."
    lines = run.metrics.read_text().splitlines() if run.metrics.is_file() else []
    measured = [line for text in lines if "eval_loss" in (line := json.loads(text))]
    if not measured:
        return "Not measured on held-out rows."
    best = [int(path.name.removeprefix("step-")) for path in run.best.glob("step-*")]
    last = next((line for line in measured if line["step"] in best), measured[-1])
    figures = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in last.items() if name != "step")
    return f"Over held-out rows after step {last['step']:,}: {figures}."


def suite_table(suite: dict[str, Any]) -> str:
    """A suite's figures, a column for each model."""
    models: dict[str, dict[str, Any]] = suite["models"]
    labels = list(next(iter(models.values())))
    rows = ([label, *(estimate(figures[label]) for figures in models.values())] for label in labels)
    return table([f"{suite['name']}, {suite['rows']:,} rows", *models], rows)


def estimate(found: dict[str, float]) -> str:
    """A figure and its interval."""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g})"


def certificate(merge: dict[str, Any] | None) -> str:
    """What is known of a merge: its certificate, or that it has none."""
    if merge is None:
        return ""
    how = f"In {merge['dtype']}, " + ("from the merged model" if merge["base"] == "merged" else f"{merge['base']} base")
    found = merge["certificate"]
    if found is None:
        return f"{how}. It was not verified: nobody has measured how far it is from the unmerged model."
    rows = [
        ["mean KL, nats", f"{found['mean_kl']:.2e}"],
        ["99th percentile of KL", f"{found['p99_kl']:.2e}"],
        ["same first choice", f"{found['top1_agreement']:.2%}"],
        ["loss, unmerged", f"{found['loss_unmerged']:.4f}"],
        ["loss, merged", f"{found['loss_merged']:.4f}"],
    ]
    read = ", the merged model read from the disk a layer at a time" if found["manner"] == "streamed" else ""
    over = f"against the unmerged model over {found['positions']:,} positions of {found['rows']:,} rows{read}"
    verdict = ""
    if found["limit"] is not None:
        default = f", asked for ({found['default_limit']:.0e} by default)"
        asked = "" if found["limit"] == found["default_limit"] else default
        verdict = f" The certificate {'holds' if found['held'] else 'does **not** hold'}: "
        verdict += f"the limit of the mean KL is {found['limit']:.0e}{asked}."
    return f"{how}, {over}.{verdict}\n\n{table(['', ''], rows)}"


def data(facts: dict[str, Any], recipe: Recipe) -> str:
    """What was trained on and what was held out: names, counts and hashes."""
    known = facts.get("data", {})
    files = known.get("files", {})
    trained = [["train", short(one["path"]), files.get(one["path"], "")] for one in known.get("parts", [])]
    held_out = [["held out", short(path), digest] for path, digest in facts.get("held_out_files", {}).items()]
    held_out = held_out or [["held out", short(source.path), ""] for source in recipe.data.eval]
    counts = ""
    if known:
        digest = facts.get("fingerprints", {}).get("data", "")
        counts = f"{known['rows']:,} rows, {known['trained_tokens']:,} trained tokens"
        counts += f"; SHA-256 of the rows as they were encoded: `{digest}`.\n\n"
    rows = ([role, name, f"`{digest}`" if digest else ""] for role, name, digest in trained + held_out)
    return counts + table(["", "source", "SHA-256"], rows)


def keys(recipe: Recipe) -> str:
    """The recipe's keys that are not at their defaults, as YAML."""
    return to_yaml(_short(recipe.model_dump(by_alias=True, exclude_defaults=True, exclude={"output_dir"})))


def versions(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Package and version."""
    yield "qlora", facts.get("qlora", "unknown")
    yield from facts.get("packages", {}).items()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text of a cell: no bar, and no line break, of a name can end it."""
    return " ".join(text.replace("|", "\\|").split())


def _short(value: Any) -> Any:
    """A value whose paths from the root are their last parts: a card goes to others."""
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return short(value) if isinstance(value, str) and Path(value).is_absolute() else value


def short(path: str) -> str:
    """The last part of a path from the root; any other name as it is."""
    return Path(path).name if Path(path).is_absolute() else path
