"""The tables and figures of docs/loftq.md, made of the results that scripts/study_loftq.py left in docs/loftq/.

python scripts/study_loftq_page.py [--no-figures]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "loftq.md"
RESULTS = PAGE.with_suffix("")
SEEDS = 3
"""How many a start needs to stand in a table; the first one is 1."""


def main() -> None:
    """Every table between its marks, and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-figures", action="store_true", help="they need `pip install 'qlora[plot]'`")
    arguments = parser.parse_args()
    PAGE.write_text(with_tables(PAGE.read_text()))
    if not arguments.no_figures:
        draw(RESULTS)


def with_tables(text: str) -> str:
    """The page with each table, between the marks of its name, made anew of the results."""
    for file in sorted(RESULTS.glob("*.json")):
        make = TABLES.get(file.stem, training_table)
        pattern = rf"(<!-- {re.escape(file.stem)} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), f"docs/loftq.md has no place for {file.name}"
        table = make(json.loads(file.read_text()))
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


def training_table(runs: list[dict[str, Any]]) -> str:
    """Perplexity of the rows for testing: before training, and after it at the tuned rate, mean ± half the spread."""
    lines = ["| start | before | after | ± | rate |", "|---|---|---|---|---|"]
    for name, best in tuned(runs).items():
        after = np.exp([one["after"]["test"] for one in best])
        before = np.exp(np.mean([one["before"]["test"] for one in best]))
        spread = (after.max() - after.min()) / 2
        lines.append(f"| {name} | {before:,.2f} | {after.mean():.3f} | {spread:.3f} | {best[0]['rate']:g} |")
    return "\n".join(lines)


def tuned(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of every start at its rate, the one of least tuning loss with the first seed; all three seeds."""
    found = {}
    for name in dict.fromkeys(one["start"] for one in runs):
        mine = [one for one in runs if one["start"] == name]
        best = min((one for one in mine if one["seed"] == 1), key=lambda one: one["after"]["tune"])
        seeds = [one for one in mine if one["rate"] == best["rate"]]
        if len(seeds) == SEEDS:
            found[name] = seeds
    return found


def errors_table(found: list[dict[str, Any]]) -> str:
    """Error ÷ plain's at T = 1, 2, 5 and 10, with the T of the least."""
    lines = ["| weights | r | type | order | T 1 | T 2 | T 5 | T 10 | least at T |", "|---" * 9 + "|"]
    for one in found:
        ratios = one["ratios"]
        at = " | ".join(f"{ratios[count - 1]:.3f}" for count in (1, 2, 5, 10))
        least = int(np.argmin(ratios)) + 1
        order = one["order"].replace("_", " ")
        lines.append(f"| {one['source']} | {one['rank']} | {one['type']} | {order} | {at} | {least} |")
    return "\n".join(lines)


def iterations_table(found: list[dict[str, Any]]) -> str:
    """Perplexity before training, a line for each type and order."""
    counts = sorted({one["iterations"] for one in found})
    lines = [f"| type | order | {' | '.join(f'T {count}' for count in counts)} |", "|---" * (len(counts) + 2) + "|"]
    for name, order in dict.fromkeys((one["type"], one["order"]) for one in found):
        values = [np.exp(one["loss"]) for one in found if (one["type"], one["order"]) == (name, order)]
        lines.append(f"| {name} | {order.replace('_', ' ')} | {' | '.join(f'{value:,.2f}' for value in values)} |")
    return "\n".join(lines)


TABLES = {"errors": errors_table, "iterations": iterations_table}
"""What makes a table of a file of results; the others are of training."""


def draw(folder: Path) -> None:
    """errors.svg: error against T. training.svg: perplexity after training of every start, with its spread."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same file for the same figures
    from matplotlib import pyplot

    shown = [one for one in json.loads((folder / "errors.json").read_text()) if one["source"] == "GPT-2"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for one, (style, marker) in zip(shown, [(s, m) for m in "osv^Dx*+" for s in ("-", "--")], strict=False):
        label = f"{one['type']}, r {one['rank']}, {one['order'].replace('_', ' ')}"
        axes.plot(range(1, len(one["ratios"]) + 1), one["ratios"], style, marker=marker, markersize=4, label=label)
    axes.set(xlabel="T", ylabel="error ÷ plain quantisation's", title="GPT-2's attention matrices")
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(folder / "errors.svg", metadata={"Date": None})
    files = sorted(folder.glob("*-r*.json"))
    figure, rows = pyplot.subplots(1, len(files), figsize=(5 * len(files), 5), squeeze=False)
    for axes, file in zip(rows[0], files, strict=True):
        best = tuned(json.loads(file.read_text()))
        after = [np.exp([one["after"]["test"] for one in runs]) for runs in best.values()]
        spread = [[one.mean() - one.min() for one in after], [one.max() - one.mean() for one in after]]
        axes.errorbar([one.mean() for one in after], [*best], xerr=spread, fmt="o", capsize=3)
        axes.set(title=file.stem, xlabel="perplexity after training", xscale="log")
        axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "training.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
