"""What preparing data costs: rows per second beside TRL's with the same output, the second start, and memory.

    python scripts/bench_data.py ../shared/data [--trl FOLDER] [--rows 1000000] [--json FILE]

The data folder holds text/gsm8k/train.jsonl and tokenizers/smollm2-135m-instruct/tokenizer.json. Every measurement is
a process of its own with empty caches, and its imports do not count; ours and TRL's take turns (ABBA). TRL is no
dependency: `pip install --target FOLDER --no-deps trl==1.16.0` puts it where --trl finds it. The tables are those of
docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from data_runs import same_rows

RUNS = Path(__file__).resolve().parent / "lib" / "data_runs.py"
TRL_VERSION = "1.16.0"
FEW_ROWS = 10_000  # what the memory of many rows is compared with

HEAD = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{{ m.content + '<|im_end|>\\n' }}"
NO_LAST = "{{ m.content + '<|im_end|>' + ('\\n' if add_generation_prompt or not loop.last else '') }}"
MARKED = (
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ m.content + '<|im_end|>' }}{%- endif %}{{ '\\n' }}"
)


@dataclass(frozen=True)
class Case:
    """A chat template, and the way in which TRL is told what to train."""

    what: str
    template: str
    messages: bool = False  # rows of `messages` with assistant_only_loss, else prompt and completion: TRL's defaults
    is_equal: bool = True  # False: TRL trains the line break behind the stop token too, so one run shows all


CASES = [
    Case("defaults; ChatML without a line break at the end", HEAD + NO_LAST + PROMPT),
    Case("assistant_only_loss; ChatML with generation marks", HEAD + MARKED + PROMPT, messages=True),
    Case("defaults; ChatML", HEAD + PLAIN + PROMPT, is_equal=False),
]


def main() -> None:
    """Three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--trl", type=Path, help="a folder that holds TRL")
    parser.add_argument("--pairs", type=int, default=4, help="measurements of each; 0: only memory")
    parser.add_argument("--limit", type=int, help="rows of GSM8K, all by default")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows whose memory is measured; 0: none")
    parser.add_argument("--quiet", type=float, default=0, help="seconds that a run may wait for an idle machine")
    parser.add_argument("--json", type=Path, help="where every single measurement goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(arguments.data, folder, arguments.trl, arguments.quiet)
        result: dict[str, Any] = {}
        if arguments.pairs:
            result["speed"] = speed(bench, arguments.pairs, arguments.limit)
        if arguments.rows:
            result["rows"] = memory(bench, arguments.rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Bench:
    """Where everything lies."""

    data: Path
    folder: Path
    trl: Path | None
    quiet_s: float

    @property
    def has_trl(self) -> bool:
        """Whether TRL can be imported."""
        look = [sys.executable, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('trl') is None)"]
        return subprocess.run(look, env=self.environment(self.folder), check=False).returncode == 0

    def environment(self, caches: Path) -> dict[str, str]:
        """The environment of a measured process."""
        folders = [str(self.trl.resolve()) if self.trl else "", os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, folders))
        caches_of = {"QLORA_CACHE": str(caches / "qlora"), "HF_DATASETS_CACHE": str(caches / "datasets")}
        quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **caches_of, **quiet, "PYTHONPATH": path}

    def run(self, kind: str, caches: Path, **job: Any) -> dict[str, Any]:
        """A measured process's result, with the cores that everything else on the machine used meanwhile."""
        job["tokenizer"] = str(self.data / "tokenizers" / "smollm2-135m-instruct" / "tokenizer.json")
        command = [sys.executable, str(RUNS), kind, json.dumps(job)]
        wait_until_idle(self.quiet_s)
        started, busy, own = time.perf_counter(), busy_seconds(), children_seconds()
        done = subprocess.run(command, env=self.environment(caches), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-4000:]}")
        others = busy_seconds() - busy - (children_seconds() - own)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "others_cores": round(max(others, 0) / (time.perf_counter() - started), 2)}


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def speed(bench: Bench, pairs: int, limit: int | None) -> list[dict[str, Any]]:
    """Rows per second of each case, the same rows proven before any ratio is printed."""
    with_trl = bench.has_trl
    if not with_trl:
        print(f"TRL is not here; `pip install --target FOLDER --no-deps trl=={TRL_VERSION}`, then --trl FOLDER\n")
    files = write_gsm8k(bench, limit)
    print("| TRL's setting; template | same ids, same trained | ours, rows/s | TRL, rows/s | ratio (of the best) |")
    print("|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    for number, case in enumerate(CASES if with_trl else CASES[-1:]):
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for turn in range(pairs if case.is_equal or not with_trl else 1):
            for kind in (("ours", "trl"), ("trl", "ours"))[turn % 2][:: 1 if with_trl else 2]:
                caches = bench.folder / f"{number}-{turn}-{kind}"
                caches.mkdir()
                out = str(bench.folder / f"{number}-{kind}.npz") if turn == 0 else None
                file = files["questions" if kind == "ours" else "messages" if case.messages else "prompts"]
                job = {"file": str(file), "template": case.template, "assistant_only": case.messages, "out": out}
                runs[kind].append(bench.run(kind, caches, **job))
        same = same_rows(*(str(bench.folder / f"{number}-{kind}.npz") for kind in runs)) if with_trl else None
        again = {"file": str(files["questions"]), "template": case.template}
        second = bench.run("ours", bench.folder / f"{number}-0-ours", **again)
        found.append({"case": case.what, "same": same, "second": second, **runs})
        print(line(found[-1]), flush=True)
    print(f"\nSecond start from the cache: {found[0]['second']['seconds']:.3f} s. {told(found)}\n", flush=True)
    return found


def write_gsm8k(bench: Bench, limit: int | None) -> dict[str, Path]:
    """GSM8K as it is, and in the two shapes that TRL takes without a function of the user's."""
    lines = (bench.data / "text" / "gsm8k" / "train.jsonl").read_text().splitlines()[:limit]
    shaped: dict[str, list[Any]] = {"questions": [], "messages": [], "prompts": []}
    for row in map(json.loads, lines):
        ask, answer = {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}
        shaped["questions"].append(row)
        shaped["messages"].append({"messages": [ask, answer]})
        shaped["prompts"].append({"prompt": [ask], "completion": [answer]})
    files = {name: bench.folder / f"{name}.jsonl" for name in shaped}
    for name, rows in shaped.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def line(found: dict[str, Any]) -> str:
    """A line of the table; a ratio only where the output is the same."""
    ours = rates(found["ours"])
    if not found["trl"]:
        return f"| {found['case']} | | {ours[0]:,.0f} (best {ours[1]:,.0f}) | | |"
    theirs, (num_rows, ids, trained) = rates(found["trl"]), found["same"]
    ratio = f"{ours[0] / theirs[0]:.2f} ({ours[1] / theirs[1]:.2f})" if trained == num_rows else "other output"
    return (
        f"| {found['case']} | {ids:,}, {trained:,} of {num_rows:,} | {ours[0]:,.0f} (best {ours[1]:,.0f}) "
        f"| {theirs[0]:,.0f} (best {theirs[1]:,.0f}) | {ratio} |"
    )


def rates(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Rows per second: of the median run, and of the fastest."""
    seconds = [run["seconds"] for run in runs]
    return runs[0]["num_rows"] / statistics.median(seconds), runs[0]["num_rows"] / min(seconds)


def told(found: list[dict[str, Any]]) -> str:
    """Processor seconds and the load, over all cases."""
    parts = []
    for kind, name in (("ours", "ours"), ("trl", "TRL's")):
        runs = [run for case in found for run in case[kind]]
        if runs:
            parts.append(f"{statistics.median(run['cpu_s'] for run in runs):.2f} {name}")
    others = statistics.median(run["others_cores"] for case in found for run in case["ours"] + case["trl"])
    return f"Processor seconds: {', '.join(parts)}. Everything else on the machine used {others:.2f} cores."


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory(bench: Bench, num_rows: int) -> dict[str, Any]:
    """Peaks of anonymous memory over many rows and over few."""
    found: dict[int, dict[str, Any]] = {}
    for number in (min(FEW_ROWS, num_rows // 2), num_rows):
        file = bench.folder / f"{number}.jsonl"
        with file.open("w") as rows:
            rows.writelines(generated(number))
        caches = bench.folder / f"rows-{number}"
        caches.mkdir()
        found[number] = bench.run("rows", caches, file=str(file), template=CASES[-1].template)
    few, many = found.values()
    print(f"| | {few['num_rows']:,} rows | {many['num_rows']:,} rows | | peaks differ by |")
    print("|---|---|---|---|---|")
    for name, one in many.items():
        if isinstance(one, dict):
            other, steps = few[name], f"{one['num_steps']:,} steps" if "num_steps" in one else ""
            more = (one["peak_bytes"] - other["peak_bytes"]) / 1e6
            peaks = [f"{run['seconds']:.2f} s, {run['peak_bytes'] / 1e6:,.0f} MB" for run in (other, one)]
            print(f"| {name} | {peaks[0]} | {peaks[1]} | {steps} | {more:+,.0f} MB |")
    print(f"\nEverything else on the machine used {many['others_cores']:.2f} cores.", flush=True)
    return {str(number): run for number, run in found.items()}


def generated(number: int, seed: int = 0) -> Iterator[str]:
    """Rows of a question and an answer, some 45 tokens of made-up words each; no two are the same."""
    draw = random.Random(seed)
    sounds = [first + second for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(draw.choices(sounds, k=draw.randint(1, 3))) for _ in range(20_000)]
    for index in range(number):
        question = f"{' '.join(draw.choices(words, k=draw.randint(4, 9)))} {index}?"
        yield json.dumps({"question": question, "answer": " ".join(draw.choices(words, k=draw.randint(3, 9)))}) + "\n"


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have used since it started."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(most_s: float) -> None:
    """Waits until nothing used more than a twentieth of a core for 2 seconds, or until the time is over."""
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        busy = busy_seconds()
        time.sleep(2)
        if busy_seconds() - busy < 0.1:
            return


def children_seconds() -> float:
    """Processor seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
