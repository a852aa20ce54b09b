"""What growth.py measures in a process of its own: one part, printed as JSON.

    python scripts/bench/growth_part.py tokens|rank|checkpoint|loss CASE.json TURNS

A part takes the case, whose model and rows prepare.py has written, and says what it found in plain numbers. Steps are
those of `qlora train`: its session, its feed and its optimizer step. Of a window of the case's rows as many are taken
as the part asks for.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cases import Case, read_case
from contestant_ours import recipe_of
from stats import turns
from torch.profiler import ProfilerActivity, profile

from qlora_cli.data.encode import Example
from qlora_cli.data.order import Window
from qlora_cli.display import QuietReport
from qlora_cli.kernels.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy
from qlora_cli.train.loop import save, take_step
from qlora_cli.train.run import claim, locked
from qlora_cli.train.session import Session, prepare

ROWS = (1, 2, 4, 8)
"""Rows of a step, of the case's length, in one micro-batch."""

RANKS = (8, 64)
RANK_STEPS = 3
"""Steps of a turn of each adapter."""

SAVE_STEPS = 4
CHUNKS = (1, 2, 4, 8)
VOCABULARIES = (49152, 151936)


class Run:
    """A session and the windows that it has not taken yet."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.windows = session.feed.windows(session.total_steps, 0, None)

    def step(self, rows: int = 1) -> None:
        """An optimizer step over the first rows of the next window, done when it returns."""
        window, self.session.place = next(self.windows)
        some: Window[Example] = Window(window.step, window.epoch, window.units[:rows])
        take_step(self.session, some, lambda: None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def seconds(self, rows: int = 1, steps: int = 1) -> float:
        """The mean seconds of so many steps, fetching their rows among it."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step(rows)
        return (time.perf_counter() - started) / steps


def clocked(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def opened(case: Case, r: int = 16) -> Iterator[Run]:
    """The case's run with an adapter of rank r, ready for its first step."""
    recipe = recipe_of(case)
    adapter = recipe.adapter.model_copy(update={"r": r})
    recipe = recipe.model_copy(update={"adapter": adapter, "output_dir": f"{recipe.output_dir}-{r}"})
    with locked(Path(recipe.output_dir)) as folder:
        claim(folder, recipe, b"")
        session = prepare(recipe, folder, QuietReport(), "never")
        assert session.packed, "rows lie one behind the other in one micro-batch"
        with session.writer:
            yield Run(session)


def tokens(case: Case, number: int) -> dict[str, Any]:
    """Seconds of a step by its tokens, one of each size in every turn; smaller steps are the mean of several."""
    seconds: dict[str, list[float]] = {str(rows * case.length): [] for rows in ROWS}
    with opened(case) as run:
        for rows in ROWS:
            run.step(rows)
        for order in turns([*seconds], number):
            for name in order:
                rows = int(name) // case.length
                seconds[name].append(run.seconds(rows, ROWS[-1] // rows))
    return {"seconds": seconds}


def rank(case: Case, number: int) -> dict[str, Any]:
    """Seconds of a step by the adapter's rank: two adapters, each on a base of its own, in turns A B, B A."""
    with ExitStack() as stack:
        runs = {str(r): stack.enter_context(opened(case, r)) for r in RANKS}
        for run in runs.values():
            run.seconds(steps=2)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for order in turns([*runs], number):
            for name in order:
                seconds[name].append(runs[name].seconds(steps=RANK_STEPS))
    return {"seconds": seconds}


def checkpoint(case: Case, number: int) -> dict[str, Any]:
    """Seconds, one entry for each save: the loop's call, the write beside it, and the steps until the next save.

    beside: of `steps`, how many began while the writer was at work. first_save_s: of one before, which is not counted.
    """
    saves: list[dict[str, Any]] = []
    with opened(case) as run:
        writer = run.session.writer
        run.seconds(steps=2)
        alone = [run.seconds() for _ in range(SAVE_STEPS)]
        first = clocked(lambda: save(run.session))
        writer.wait()
        for _ in range(number):
            run.step()
            save_s, began = clocked(lambda: save(run.session)), time.perf_counter()
            writing = writer.writing
            assert writing is not None, "a save begins to write"
            ends: list[float] = []
            writing.add_done_callback(lambda _, ends=ends: ends.append(time.perf_counter()))  # type: ignore[misc]
            beside, steps = 0, []
            for _ in range(SAVE_STEPS - 1):
                beside += not writing.done()
                steps.append(run.seconds())
            writer.wait()
            saves.append({"save_s": save_s, "write_s": ends[0] - began, "steps": steps, "beside": beside})
    alone += [seconds for one in saves for seconds in one["steps"][one["beside"] :]]
    return {"saves": saves, "first_save_s": first, "alone_s": alone, "step_s": statistics.median(alone)}


def loss(case: Case, _number: int) -> dict[str, Any]:
    """By vocabulary the tokens of a chunk and, for each number of chunks, the bytes of a loss and its backward.

    Beside what was there before, and without the hidden states' gradient. The head is frozen, in bfloat16.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        head = torch.nn.Linear(case.shape.hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
        head.requires_grad_(False)
        chunk = CHUNK_BYTES[device.type] // (vocabulary * 2)
        taken = [bytes_of_loss(head, chunk * number) for number in CHUNKS]
        found[str(vocabulary)] = {"chunk_tokens": chunk, "chunks": CHUNKS, "bytes": taken}
    return {"vocabularies": found}


def bytes_of_loss(head: torch.nn.Linear, num_tokens: int) -> int:
    """The most bytes of the second of two passes over so many tokens: in the first one libraries set themselves up."""
    hidden = torch.randn(num_tokens, head.in_features, device=head.weight.device).to(head.weight.dtype)
    hidden.requires_grad_()
    targets = torch.randint(head.out_features, (num_tokens,), device=head.weight.device)

    def once() -> None:
        hidden.grad = None
        linear_cross_entropy(hidden, targets, head).backward()

    once()
    hidden.grad = None
    return most_bytes(once) - hidden.nbytes


def most_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors take during a call beside those that were there before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


PARTS = {"tokens": tokens, "rank": rank, "checkpoint": checkpoint, "loss": loss}


def main() -> None:
    """Prints what the named part found."""
    name, case, number = sys.argv[1:4]
    print(json.dumps(PARTS[name](read_case(Path(case)), int(number))))


if __name__ == "__main__":
    main()
