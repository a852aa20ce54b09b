"""Files written by a thread while the next tensors are computed: a disk and a processor work at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Full, Queue
from types import TracebackType

from torch import Tensor

from qlora_cli.model.safetensors_stream import Entry, SafetensorsWriter

Write = Callable[[str, Tensor], None]
"""Hands on one tensor of a file by its name, or the next rows of it."""

Item = tuple[str, Tensor] | BaseException | None
"""What the thread is handed: a tensor and its name, why the file is given up, or that it is whole."""


WAITING = 32
"""Pieces that may wait, 2 MB each in 16 bits: what is computed while a file of 100 MB is synced."""


class Behind:
    """One file after the other. A context: leaving it waits for all, and raises the error of one that failed.

    Memory holds what waits and what is written, beside what is computed: some rows of a tensor each.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "qlora-merge")
        self.files: list[Future[None]] = []

    @contextmanager
    def file(self, path: Path, entries: Sequence[Entry]) -> Iterator[Write]:
        """A safetensors file that gets its name once it is whole and on the disk; not where the block fails."""
        self._raise_failed()
        waiting: Queue[Item] = Queue(WAITING)
        writing = self.thread.submit(_write, path, entries, waiting)
        self.files.append(writing)

        def hand(item: Item) -> None:
            while True:
                with suppress(Full):
                    return waiting.put(item, timeout=0.1)
                if writing.done():  # it has failed
                    return writing.result()

        try:
            yield lambda name, tensor: hand((name, tensor))
        except BaseException as error:
            with suppress(BaseException):  # the thread's, which this block has raised already
                hand(error)
            raise
        hand(None)

    def _raise_failed(self) -> None:
        for file in self.files:
            if file.done():
                file.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread.shutdown(wait=True)
        if kind is None:
            self._raise_failed()


def _write(path: Path, entries: Sequence[Entry], waiting: Queue[Item]) -> None:
    with SafetensorsWriter(path, entries, metadata={"format": "pt"}) as writer:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            writer.write(*item)
