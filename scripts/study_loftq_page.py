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
    for name in sorted({one["start"] for one in runs}, key=lambda start: _place(*start.partition(" + ")[::2])):
        mine = [one for one in runs if one["start"] == name]
        best = min((one for one in mine if one["seed"] == 1), key=lambda one: one["after"]["tune"])
        seeds = [one for one in mine if one["rate"] == best["rate"]]
        if len(seeds) == SEEDS:
            found[name] = seeds
    return found


def _place(stored: str, start: str) -> tuple[int, int]:
    """Where a start stands in a table."""
    return STORED.index(stored), STARTED.index(start)


STORED = ["16-bit LoRA", "nf4", "int4", "3 bits", "2.5 bits", "2.25 bits", "int2", "nf2"]
STARTED = ["", "LoftQ", "LoftQ, SVD first", "aware", "aware, SVD first"]


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
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    errors = [one for one in json.loads((folder / "errors.json").read_text()) if one["source"] == "GPT-2"]
    ranks = sorted({one["rank"] for one in errors})
    figure, axes = pyplot.subplots(1, len(ranks), figsize=(10, 4.5), sharey=True, layout="constrained")
    for rank, place in zip(ranks, axes, strict=True):
        for one in (one for one in errors if one["rank"] == rank):
            style = "-" if one["order"] == "quantize_first" else "--"
            look = {"marker": MARKERS[one["type"]], "markersize": 4, "color": "black", "linewidth": 0.8}
            label = f"{one['type']}, {one['order'].replace('_', ' ')}"
            place.plot(range(1, len(one["ratios"]) + 1), one["ratios"], style, label=label, **look)
        place.set(xlabel="T", title=f"GPT-2's attention matrices, rank {rank}")
    axes[0].set_ylabel("error ÷ plain quantisation's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(folder / "errors.svg", metadata={"Date": None})

    files = sorted(folder.glob("*-r*.json"))
    figure, grid = pyplot.subplots(-(-len(files) // 2), 2, figsize=(10, 9), squeeze=False, layout="constrained")
    for place, file in zip(grid.flat, files, strict=False):
        best = tuned(json.loads(file.read_text()))
        after = [np.exp([one["after"]["test"] for one in runs]) for runs in best.values()]
        spread = [[one.mean() - one.min() for one in after], [one.max() - one.mean() for one in after]]
        place.errorbar([one.mean() for one in after], [*best], xerr=spread, fmt="o", color="black", capsize=3)
        place.set(title=file.stem, xlabel="perplexity after training", xscale="log")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
        place.xaxis.set_major_formatter(ScalarFormatter())
        place.xaxis.set_minor_formatter(NullFormatter())
        place.grid(axis="y", linewidth=0.3)
        place.invert_yaxis()
    figure.savefig(folder / "training.svg", metadata={"Date": None})


MARKERS = {"nf4": "o", "int4": "s", "int2": "v", "nf2": "x"}


if __name__ == "__main__":
    main()
