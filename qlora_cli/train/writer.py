"""A thread that writes to the disk while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Writer:
    """Writes one thing at a time, beside training. A context: leaving it waits for what is being written.

    What fails in the thread is raised by the next call here, or on leaving; where the block itself has failed, that is
    raised, and `failure` has what was not written.
    """

    def __init__(self) -> None:
        self.thread: ThreadPoolExecutor | None = None
        self.writing: Future[object] | None = None
        self.failure: BaseException | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Begins to write, once what was begun before is there."""
        self.wait()
        self.thread = self.thread or ThreadPoolExecutor(1, "qlora-writer")
        self.writing = self.thread.submit(write)

    def check(self) -> None:
        """Raises the error of a write that has failed; waits for none."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until all is written, and raises the error of what is not."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=True)
            self.thread = None
        if kind is None:
            self.wait()
        elif self.writing is not None:
            self.failure = self.writing.exception()
