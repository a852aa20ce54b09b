"""The preparing processes, seen from the parent: tasks go out, results come back in order, and who hangs is ended."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_cli.data.worker import Job, Result, Task
from qlora_cli.errors import Exit, UserError

PACKAGE = Path(__file__).parents[2]
"""The folder that `qlora_cli` is in, so that a process finds the very package that started it."""

MOST_DEATHS = 3
"""So many rows may end their process; then it is the template, and no row is tried any more."""

# the folder is on the path for one import: nothing else that lies there may stand for a module of Python's
COMMAND = (
    f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); import qlora_cli; del sys.path[0]; "
    "from qlora_cli.data.worker import main; main()"
)


class Died(Exception):
    """A process ended before it answered; the message says of what, as a clause. of_row: by a limit that it met."""

    def __init__(self, reason: str, of_row: bool = False) -> None:
        super().__init__(reason)
        self.of_row = of_row


class Pool:
    """Some preparing processes, for a `with` block: none of them outlives it.

    first_bad_ends: the first bad row is an error, so of a task whose process died no row behind it need be tried.
    """

    def __init__(self, job: Job, num_processes: int, *, first_bad_ends: bool = False) -> None:
        assert num_processes > 0, "a pool needs a process"
        self.job, self.num_processes, self.first_bad_ends = job, num_processes, first_bad_ends
        self.processes: list[_Process] = []
        self.idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(num_processes):
            self.idle.put(None)  # started when it is needed: ten rows need one
        self.threads = ThreadPoolExecutor(num_processes)
        self.num_deaths = 0
        self.lock = threading.Lock()
        """Held while a process is started, and while `closed` or `num_deaths` changes."""
        self.closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.lock:
            self.closed = True
        for process in self.processes:
            process.end()
        self.threads.shutdown(cancel_futures=True)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The result of each task, in the tasks' order; few are taken ahead of those given back.

        Raises UserError for what is wrong with all rows: the template.
        """
        pending: deque[Future[Result]] = deque()
        for task in tasks:
            pending.append(self.threads.submit(self._run, task))
            if len(pending) > 2 * self.num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(self, task: Task) -> Result:
        """The result of a task; where its process dies, each row is tried alone."""
        if not task.rows:
            return Result()
        try:
            return self._ask(task)
        except Died as death:
            if self.closed:
                raise
            if len(task.rows) == 1:
                return self._buried(task, death)
        total = Result()
        for index, (row, place) in enumerate(zip(task.rows, task.places, strict=True)):
            _add(total, self._run(replace(task, rows=[row], places=[place])), index)
            if total.bad and self.first_bad_ends:
                break
        return total

    def _buried(self, task: Task, death: Died) -> Result:
        """The result of a row that ended its process. Raises UserError where it was not the row's doing."""
        if not death.of_row:
            todo = "start the same command again; set data.workers lower where memory is short"
            raise UserError(task.places[0], f"the process that prepared the row {death}", todo, Exit.FAILED)
        with self.lock:
            self.num_deaths += 1
        error = UserError(task.places[0], f"preparing the row {death}", "mend or remove the row, or the chat template")
        if self.num_deaths >= MOST_DEATHS:
            what = f"{error.what}, as did {MOST_DEATHS - 1} rows before it, so none is tried any more"
            raise UserError(error.where, what, "mend the template, or the rows")
        return Result(bad=[(0, error.where, error.what, error.todo)])

    def _ask(self, task: Task) -> Result:
        """The task's result from a process that is free, or from a new one."""
        process = self.idle.get()
        try:
            if process is None:
                process = self._started()
            return process.ask(task)
        except Died:
            process = None
            raise
        finally:
            self.idle.put(process)

    def _started(self) -> _Process:
        """A new process that has its job."""
        with self.lock:
            if self.closed:
                raise Died("was ended")
            process = _Process(self.job)
            self.processes.append(process)  # before it is ready: whoever hangs while it loads is ended too
        process.begin()
        return process


class _Process:
    """One preparing process. allowed: the processor time it has for what it does now, in words."""

    def __init__(self, job: Job) -> None:
        self.job, self.allowed = job, f"{job.load_seconds:g} s of processor time"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # -P: a file called json.py in the user's folder is not ours. A group of its own: Ctrl-C is for us alone.
        command = [sys.executable, "-P", "-c", COMMAND]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        try:
            self.child = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, process_group=0
            )
        except OSError as error:
            what = f"no preparing process can be started: {error.strerror}"
            raise UserError("data.workers", what, "set it to 1, or free memory", Exit.FAILED) from error

    def begin(self) -> None:
        """Gives the process its job. Raises UserError where it cannot load the tokenizer or compile the template."""
        try:
            self._tell(self.job)
            self._hear()
        except Died as death:
            what = f"preparing the tokenizer and the chat template {death}"
            raise UserError(self.job.settings.called, what, "use a template that you trust") from death
        self.allowed = f"{self.job.row_seconds:g} s of processor time (or {self.job.chunk_seconds:g} s to tokenise)"

    def ask(self, task: Task) -> Result:
        """The process's result. Raises Died, and UserError for what is wrong with all rows."""
        self._tell(task)
        header, ids = self._hear()
        return Result(
            examples=[tuple(one) for one in header["examples"]],
            bad=[tuple(one) for one in header["bad"]],
            tally=Counter(header["tally"]),
            long=[tuple(one) for one in header["long"]],
            lost=Counter(header["lost"]),
            ids=array("I", ids),
        )

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # for what it was not told any more
                pipe.close()

    def _tell(self, thing: Job | Task) -> None:
        assert self.child.stdin is not None
        data = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self.child.stdin.write(struct.pack("<Q", len(data)) + data)
            self.child.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _hear(self) -> tuple[dict[str, Any], bytes]:
        """The next answer: its header and its ids."""
        assert self.child.stdout is not None
        head = self.child.stdout.read(16)
        if len(head) < 16:
            raise self._death()
        sizes = struct.unpack("<QQ", head)
        text, ids = (self.child.stdout.read(size) for size in sizes)
        if len(ids) < sizes[1]:
            raise self._death()
        header = json.loads(text)
        if bug := header.get("bug"):
            raise RuntimeError(f"a preparing process failed:\n{bug}")
        if error := header.get("error"):
            raise UserError(*error)
        return header, ids

    def _death(self) -> Died:
        """Why the process ended."""
        code = self.child.wait()
        if code == -signal.SIGPROF:
            return Died(f"took more than {self.allowed}", of_row=True)
        if code in (-signal.SIGABRT, -signal.SIGSEGV):
            return Died(f"needed more than {self.job.memory_bytes // 2**20:,} MiB of memory", of_row=True)
        if code == -signal.SIGKILL:
            return Died("was killed from outside: mostly the system does so when memory runs out")
        return Died(f"ended its process (exit status {code})")


def _add(total: Result, one: Result, index: int) -> None:
    """Adds the result of the row `index`, prepared alone."""
    total.examples += [(index, *rest) for _, *rest in one.examples]  # type: ignore[misc]
    total.bad += [(index, where, what, todo) for _, where, what, todo in one.bad]
    total.tally += one.tally
    total.long += [(index, tokens, prompt) for _, tokens, prompt in one.long]
    total.lost += one.lost
    total.ids.extend(one.ids)
