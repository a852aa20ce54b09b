"""One measured preparation in a process of its own, for scripts/bench_data.py: ours, TRL's, or many rows of ours.

    python scripts/lib/data_runs.py ours|trl|rows '{"file": ..., ...}'

The argument is a JSON object; the result is one on the last line of standard output. Imports, and for TRL the model
and the trainer around the preparation, are outside the measured time; the processes that we start are inside of it.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

EOS = "<|im_end|>"


def ours(file: str, tokenizer: str, template: str, out: str | None = None, **_: Any) -> dict[str, Any]:
    """load_examples over a file of questions and answers; the ids go to `out`."""
    examples, measured = _prepare(file, tokenizer, template)
    if out:
        write_ids(out, [(row.input_ids, row.labels) for row in examples.rows])
    return {**measured, "num_rows": len(examples.rows)}


def trl(file: str, tokenizer: str, template: str, assistant_only: bool, out: str | None = None, **_: Any) -> Any:
    """What SFTTrainer's constructor does to a file of conversations with SFTConfig's defaults; reading it included."""
    import trl  # type: ignore[import-not-found]
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    words = _tokenizer(tokenizer, template)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
    config = trl.SFTConfig(Path(out or file).parent, use_cpu=True, report_to="none", assistant_only_loss=assistant_only)
    clock = _Clock()
    with clock.running():
        rows = load_dataset("json", data_files=file, split="train")
    reading = clock.seconds
    plain = trl.SFTTrainer._prepare_dataset

    def timed(*arguments: Any) -> Any:
        with clock.running():
            return plain(*arguments)

    trl.SFTTrainer._prepare_dataset = timed
    found = trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=words).train_dataset
    if out:
        write_ids(out, list(zip(found["input_ids"], found["labels"], strict=True)))
    return {**clock.measured(), "num_rows": len(found), "reading_s": reading, "version": trl.__version__}


def rows(file: str, tokenizer: str, template: str, steps: int = 1000, **_: Any) -> dict[str, Any]:
    """Peak anonymous memory over preparing a file, over the first epoch's order, and over reading its windows."""
    from qlora_cli.data.order import Order

    with peak_anonymous() as peak:
        examples, measured = _prepare(file, tokenizer, template)
    found = {"prepare": {**measured, "peak_bytes": peak[0]}, "num_rows": len(examples.rows)}
    for name, capacity in (("order", None), ("packed order", 1024)):
        order = Order(((len(examples.rows), 1.0),), 16, 0, examples.lengths, capacity)
        clock = _Clock()
        with peak_anonymous() as peak, clock.running():
            order.epoch(0)
        num_steps = order.steps_of(0)
        found[name] = {**clock.measured(), "peak_bytes": peak[0], "num_steps": num_steps}
        clock = _Clock()
        with peak_anonymous() as peak, clock.running():
            for window in order.windows(min(steps, num_steps)):
                for row in window.rows:
                    examples.rows[row]
        found[f"windows of {name}"] = {**clock.measured(), "peak_bytes": peak[0], "num_steps": min(steps, num_steps)}
    return found


def _prepare(file: str, tokenizer: str, template: str) -> tuple[Any, dict[str, float]]:
    from qlora_cli.data.examples import load_examples
    from qlora_cli.recipe.schema import Data

    words = _tokenizer(tokenizer, template)
    data = Data.model_validate({"train": [{"path": file}], "max_length": 1024})
    clock = _Clock()
    with clock.running():
        examples = load_examples(data, "train", words, frozenset(), seed=1, today=date.today())
    return examples, clock.measured()


def _tokenizer(file: str, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=EOS)
    words.chat_template = template
    return words


class _Clock:
    """Wall and processor seconds, of this process and of those that it started and that have ended."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        started, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.seconds += time.perf_counter() - started
        self.cpu += _cpu_seconds() - cpu

    def measured(self) -> dict[str, float]:
        """The sums, rounded to what they are good for."""
        return {"seconds": round(self.seconds, 4), "cpu_s": round(self.cpu, 4)}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def peak_anonymous(every_s: float = 0.1) -> Iterator[list[int]]:
    """The largest sum of anonymous resident bytes of this process and its children in the block, as a list of one.

    Pages of mapped files are left out: the kernel takes them back when it needs them.
    """
    peak, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], _anonymous())


def _anonymous() -> int:
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def write_ids(path: str, rows: list[tuple[list[int], list[int]]]) -> None:
    """Ids, trained positions and lengths of all rows, for `same_rows`."""
    flat = [token for ids, _ in rows for token in ids]
    trained = [label != -100 for _, labels in rows for label in labels]
    np.savez(path, ids=flat, trained=trained, lengths=[len(ids) for ids, _ in rows])


def same_rows(left: str, right: str) -> tuple[int, int, int]:
    """Rows of the left file, those of them with the same ids in the right one, and those trained the same as well."""
    first, second = np.load(left), np.load(right)
    pairs = [_rows_of(first), _rows_of(second)]
    if len(pairs[0]) != len(pairs[1]):
        return len(pairs[0]), 0, 0
    ids = [np.array_equal(a[0], b[0]) for a, b in zip(*pairs, strict=True)]
    trained = [np.array_equal(a[1], b[1]) for a, b in zip(*pairs, strict=True)]
    return len(ids), sum(ids), sum(one and other for one, other in zip(ids, trained, strict=True))


def _rows_of(file: Any) -> list[tuple[Any, Any]]:
    cuts = np.cumsum(file["lengths"])[:-1]
    return list(zip(np.split(file["ids"], cuts), np.split(file["trained"], cuts), strict=True))


RUNS: dict[str, Callable[..., Any]] = {"ours": ours, "trl": trl, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(RUNS[sys.argv[1]](**json.loads(sys.argv[2]))))
