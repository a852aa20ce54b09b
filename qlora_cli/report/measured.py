"""What was measured of a run's models, as HTML: evaluations, the merge's certificate, answers before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from qlora_cli.data.rows import count
from qlora_cli.display_evaluation import figure
from qlora_cli.report.page import escaped, table
from qlora_cli.report.reading import RunFiles, Sample, listed, number, section
from qlora_cli.report.scales import in_words

MOST_CHARACTERS = 2000
"""Of a text that is shown; the file has all."""

MOST_EVALUATIONS = 20
"""Evaluations in training that are shown, spread over the run, its last one among them."""

MERGE_WORDS = {
    "mean_kl": "mean KL, nats",
    "p99_kl": "99th percentile of KL, nats",
    "top1_agreement": "same top token",
    "max_abs": "largest difference of a logit",
    "loss_unmerged": "loss unmerged",
    "loss_merged": "loss merged",
}
"""What figures of a merge are called; others by their own names."""


def evaluations(run: RunFiles) -> str:
    """A table for each suite, with intervals and differences, and one of the evaluations in training."""
    parts = [suite_table(place, suite) for place, suite in run.suites.items()]
    if run.evaluations:
        parts.append(f"<h3>In training</h3>{in_training(run)}")
    return "".join(parts) or "<p>Nothing was evaluated yet: <code>qlora eval RUN --baseline</code> does it.</p>"


def suite_table(place: str, suite: dict[str, Any]) -> str:
    """The figures of a suite, each with its 95% interval below it."""
    models = {name: found for name, found in suite["models"].items() if isinstance(found, dict)}
    differences = [one for one in listed(suite, "differences") if isinstance(one, dict)]
    head = ["", *map(escaped, models)]
    head += [f"{escaped(one.get('of'))} − {escaped(one.get('to'))}" for one in differences]
    rows = []
    for label in dict.fromkeys(label for found in models.values() for label in found):
        cells = [estimate(label, found.get(label)) for found in models.values()]
        cells += [estimate(label, section(one, "figures").get(label), signed=True) for one in differences]
        rows.append([escaped(label.replace("_", " ")), *cells])
    notes = "".join(f"<p>{escaped(note)}</p>" for note in listed(suite, "notes"))
    rows_told = count(int(number(suite.get("rows")) or 0), "row")
    return f"<h3>{escaped(place)}, {rows_told}</h3>{scrolling(table(head, rows, named=True))}{notes}"


def estimate(label: str, found: Any, signed: bool = False) -> str:
    """A figure and below it its interval, as HTML; a dash where there is none."""
    if not isinstance(found, dict):
        return "–"
    value, low, high = (number(found.get(name)) for name in ("value", "low", "high"))
    text = escaped(figure(label, value, signed))
    if low is None or high is None:
        return text
    ends = (figure(label, end, signed).rstrip("%p ") for end in (low, high))
    return f'{text}<br><span class="path">{escaped(" to ".join(ends))}</span>'


def in_training(run: RunFiles) -> str:
    """The evaluations in training, a line each."""
    lines = spread(run.evaluations, MOST_EVALUATIONS)
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "eval_rows"))
    head = ["step", *(escaped(name.removeprefix("eval_").replace("_", " ")) for name in names)]
    rows = []
    for line in lines:
        cells = (escaped(figure(name.removeprefix("eval_"), number(line.get(name)))) for name in names)
        rows.append([f"{line['step']:,}", *cells])
    left = len(run.evaluations) - len(lines)
    told = f"<p>{left:,} more are in metrics.jsonl.</p>" if left else ""
    return scrolling(table(head, rows, named=True)) + told


def spread(lines: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(at * (len(lines) - 1) / (most - 1))] for at in range(most)]


def merged(merge: dict[str, Any]) -> str:
    """What a merge wrote, and its certificate, or that it has none."""
    certificate = merge.get("certificate", merge.get("difference"))
    about = f"{merge.get('dtype')}, onto the {merge.get('base')} base"
    if not isinstance(certificate, dict):
        return f"<p>Merged ({escaped(about)}) without being compared with the unmerged model.</p>"
    held = certificate.get("held")
    verdict = " The certificate holds." if held else " <strong>The certificate does not hold.</strong>"
    if not isinstance(held, bool) or certificate.get("limit", 0) is None:  # nobody asked whether it is little
        verdict = ""
    rows = [
        [escaped(words_of(words)), escaped(told(words, value))] for words, value in flat(certificate) if words != "held"
    ]
    return f"<p>Merged ({escaped(about)}).{verdict}</p>{scrolling(table(('', 'measured'), rows, named=True))}"


def flat(found: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Names and values of an object, those of objects in it behind their name."""
    for name, value in found.items():
        words = f"{before}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{words}, ")
        else:
            yield words, value


def words_of(name: str) -> str:
    """What a figure of a certificate is called: `limit, mean_kl` is `limit, mean KL, nats`."""
    return ", ".join(MERGE_WORDS.get(part, part.replace("_", " ")) for part in name.split(", "))


def told(name: str, value: Any) -> str:
    """A value of a certificate in words."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if found is not None and name.endswith("agreement"):
        return f"{found:.2%}"
    return str(value) if found is None else in_words(float(f"{found:.4g}") if isinstance(value, float) else found)


def samples(run: RunFiles) -> str:
    """Answers of every model to the first rows of each suite that generates."""
    parts = []
    for suite, group in groupby(run.samples, key=lambda one: one.suite):
        shown = "".join(sample(one) for one in group)
        parts.append(f"<h3>{escaped(suite)}, its first rows</h3>{shown}")
    return "".join(parts)


def sample(one: Sample) -> str:
    """A prompt, what was expected, and what each model wrote."""
    texts = [("prompt", one.prompt), *(("expected", text) for text in one.references[:1])]
    more = len(one.references) - 1
    parts = [f"<h4>{escaped(one.where)}</h4>"]
    parts += [boxed(name, text) for name, text in texts]
    if more > 0:
        parts.append(f"<p>{more} more {'answers are' if more > 1 else 'answer is'} right too</p>")
    right = {text.strip() for text in one.references}
    for name, text in one.answers.items():
        mark = " ✓ as expected" if text.strip() in right else ""
        parts.append(boxed(f"{name}{mark}", text, "answer"))
    return f'<section class="sample">{"".join(parts)}</section>'


def boxed(name: str, text: str, kind: str = "") -> str:
    """A text under its name, its direction by its own letters."""
    cut = len(text) - MOST_CHARACTERS
    shown = text if cut <= 0 else f"{text[:MOST_CHARACTERS]} … {count(cut, 'character')} more"
    style = f' class="{kind}"' if kind else ""
    return f'<p>{escaped(name)}</p>\n<pre dir="auto"{style}>\n{escaped(shown)}</pre>'


def scrolling(found: str) -> str:
    """A table that is scrolled by itself where the page is narrower; by keys too."""
    return f'<div class="wide" tabindex="0">{found}</div>'
