"""How time and memory of qlora grow with tokens, rows, chunks of the loss, rank and checkpoints, held to bounds.

    python scripts/bench/growth.py --turns 6 --json growth.json
    python scripts/bench/growth.py --only rank checkpoint --threads 1

prints a line for every figure: the ratio, a 95% interval or the spread where there is one, its bound, and ok or missed.
It returns 1 where a bound is missed or a figure could not be measured.

    tokens       slope of log seconds over log tokens of an optimizer step with 1, 2, 4 and 8 rows of 512 tokens in one
                 packed micro-batch: least squares over the medians, in brackets the turns' smallest and largest. 0.95
                 to 1.1: below 1 is what a step costs whatever its length, above it what grows faster.
    rows         a run over 10,000 and over 100,000 rows of 32 tokens against one over 1,000, on a model so small that
                 what reading rows costs would show: seconds of a step, and peak memory after warm-up. Within 5%.
    loss         bytes that the cross-entropy takes, forward and backward, without the hidden states and their gradient:
                 2, 4 and 8 chunks of tokens against one, the one furthest from it, at 49k and 152k entries. Within 5%.
    rank         seconds of a step with r 64 against one with r 8. Below 1.1.
    checkpoint   seconds that the loop waits in a save, and those with what the steps beside the writer take longer,
                 against the median step with no writer at work. Below 1. A save is due every 4 steps.

tokens, rank and checkpoint are of case C1 of run.py: SmolLM2-135M's shape cut to 8 layers, NF4 with double
quantisation, bfloat16, LoRA r 16 on all linear layers, no recomputation; rank and checkpoint take one row of 512 tokens
a step. Each figure has a process of its own (growth_part.py); `rows` has one for each number of rows, which take turns
as the contestants of run.py do. What is compared goes A B, B A, ..., and the ratio is the median over the turns with a
bootstrap interval (stats.py). Memory of `rows` is anonymous resident memory sampled every 5 ms, in all, the interpreter
and its libraries among it; rows come from the cache, since scripts/bench_data.py measures how they get there. Memory of
`loss` is what torch's profiler sees allocated. On a GPU both are the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import SETS, Case, Shape
from growth_figures import FIGURES
from process import Died, Machine, Worker
from report import document
from stats import turns

SMALL = Shape(4096, 256, 768, 4, 4, 2)
ROW_TOKENS, ROWS_PER_STEP, ROW_STEPS = 32, 4, 16
"""Of `rows`: tokens of a row, rows of a step, and at most so many steps of a turn."""


def measure(name: str, machine: Machine, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is measured for a figure; the first one that needs C1's model and rows writes them. Raises Died."""
    if name == "rows":
        return measure_rows(machine, Path(case.folder) / "rows", arguments)
    file = Path(case.folder) / "case.json"
    if name != "loss" and not case.rows.exists():
        prepared(machine, case)
    case.write(file)
    said = machine.call("ours", file.parent, "growth_part.py", name, str(file), str(arguments.turns))
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def measure_rows(machine: Machine, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs over each number of rows, in turns; memory last, all of them as many steps from their start."""
    least = min(arguments.rows) // ROWS_PER_STEP
    steps = min(ROW_STEPS, (least - 2) // (arguments.turns + 2))
    runs: list[dict[str, Any]] = [{"rows": rows, "seconds": []} for rows in sorted(arguments.rows)]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for run in runs:
            name = str(run["rows"])
            total = run["rows"] // ROWS_PER_STEP - 1
            case = Case(name, SMALL, ROW_TOKENS, ROWS_PER_STEP, total_steps=total, folder=str(folder / name))
            workers[name] = Worker(machine, "ours", prepared(machine, case))
            stack.callback(workers[name].stop)
            workers[name].ask("steps", 1 + steps)
        by_name = {str(run["rows"]): run for run in runs}
        for order in turns([*workers], arguments.turns):
            for name in order:
                seconds = workers[name].ask("steps", steps)["seconds"]
                by_name[name]["seconds"].append(statistics.median(seconds))
        for name, worker in workers.items():
            by_name[name]["memory"] = {k: v for k, v in worker.ask("memory", steps).items() if k.endswith("_bytes")}
    return {"runs": runs, "steps": steps}


def prepared(machine: Machine, case: Case) -> Path:
    """The file of a case whose model and rows are there."""
    folder = Path(case.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = case.write(folder / "case.json")
    machine.call("ours", folder, "prepare.py", str(file), str(machine.models), str(machine.data))
    return file


def main() -> int:
    """Measures the figures one after the other, each printed as soon as it is there."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and models do not stay behind
    results: list[dict[str, Any]] = []
    written = document(results, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="qlora-growth-") as folder:
        machine = Machine(threads=arguments.threads, models=Path(folder) / "models")
        case = case_of(arguments, str(Path(folder) / "c1"))
        print("| figure | ratio | bound | verdict | of |\n|---|---|---|---|---|", flush=True)
        for name in arguments.only or FIGURES:
            results.append(result := measured(name, machine, case, arguments))
            print("\n".join(result.pop("lines")), flush=True)
            written["results"] = results
            if arguments.json:  # after every figure: a later one may fail
                arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    verdicts = [one["verdict"] for result in results for one in result["figures"]]
    return int("missed" in verdicts or any("failed" in result for result in results))


def measured(name: str, machine: Machine, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """A figure's measurements, its ratios with their verdicts, and the lines to print."""
    Path(case.folder).mkdir(exist_ok=True)
    try:
        found = measure(name, machine, case, arguments)
    except Died as died:
        return {"name": name, "figures": [], "failed": died.said, "lines": [f"{name}: failed: {died.said}"]}
    figures = FIGURES[name](found)
    rows = [asdict(one) | {"verdict": one.verdict} for one in figures]
    return {"name": name, "figures": rows, "measured": found, "lines": [one.line() for one in figures]}


def case_of(arguments: argparse.Namespace, folder: str) -> Case:
    """C1's 512 x 1 with the steps of the longest part, eight rows to each, and the sizes of the command line."""
    case = next(iter(SETS["c1"]()))
    hidden = arguments.hidden
    shape = replace(case.shape, layers=arguments.layers, hidden=hidden, intermediate=hidden * 8 // 3)
    steps = 16 * arguments.turns + 8
    return replace(case, shape=shape, length=arguments.length, rows_per_step=8, total_steps=steps, folder=folder)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*FIGURES], help="only these figures")
    parser.add_argument("--turns", type=int, default=6, help="measurements of everything that is compared")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="rows of the runs")
    parser.add_argument("--layers", type=int, default=8, help="of C1's shape")
    parser.add_argument("--hidden", type=int, default=576, help="of C1's shape: a multiple of 18")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row of C1")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process, on a CPU")
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    arguments = parser.parse_args()
    if min(arguments.rows) < ROWS_PER_STEP * (arguments.turns + 4):
        parser.error(f"--rows: {arguments.turns} turns take at least {ROWS_PER_STEP * (arguments.turns + 4)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
