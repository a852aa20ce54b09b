"""The runner's end of the conversation: contestants as processes that are asked in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TAIL = 2000
"""So many characters of what a dead worker said are shown."""


class Died(Exception):
    """A worker ended before it answered. `said`: the end of its standard error."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


@dataclass(frozen=True)
class Machine:
    """How processes are started. pythons: interpreters by contestant; the others run under the runner's own."""

    pythons: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    data: Path = Path("../shared/data")
    models: Path = Path("models")

    def python(self, contestant: str) -> str:
        """The interpreter of a contestant; trl-defaults shares that of trl."""
        return self.pythons.get(contestant) or self.pythons.get(contestant.removesuffix("-defaults"), sys.executable)

    def environment(self, folder: Path) -> dict[str, str]:
        """Threads, a cache of its own, and no network."""
        mine = {"OMP_NUM_THREADS": str(self.threads), "QLORA_CACHE": str(folder / "cache")}
        mine |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "WANDB_DISABLED": "true"}
        return {**os.environ, **mine}

    def call(self, contestant: str, folder: Path, *command: str) -> str:
        """What a script of this folder prints. Raises Died where it fails."""
        done = subprocess.run(
            [self.python(contestant), str(HERE / command[0]), *command[1:]],
            env=self.environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Died(done.stderr[-TAIL:])
        return done.stdout

    def versions(self, contestant: str, folder: Path) -> dict[str, str] | None:
        """The versions of a contestant's packages; None where it is not installed."""
        told = self.call(contestant, folder, "worker.py", contestant, "--version").strip()
        return json.loads(told.splitlines()[-1]) if told else None


class Worker:
    """A contestant's process. start_s: seconds from its start until it was ready."""

    def __init__(self, machine: Machine, contestant: str, case: Path) -> None:
        self.log = case.parent / f"{contestant}.log"
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [machine.python(contestant), str(HERE / "worker.py"), contestant, str(case)],
                env=machine.environment(case.parent),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.facts = self._read()
        self.start_s = time.perf_counter() - self.started

    def ask(self, do: str, n: int) -> dict[str, Any]:
        """The answer to a command of channel.py. Raises Died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "n": n}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read()

    def stop(self) -> None:
        """Ends the process, which is idle."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            try:
                self.process.communicate('{"do": "stop"}\n', timeout=60)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # of a command that was never read
                pipe.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> Died:
        """What a process that has closed its output, or does not read any more, said last."""
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return Died(f"exit code {code}\n" + self.log.read_text(errors="replace")[-TAIL:])
