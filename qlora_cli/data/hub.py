"""A data set of the hub, through `datasets`: out of its cache, or streamed while it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from qlora_cli.data.lines import first_line
from qlora_cli.data.readers import as_row
from qlora_cli.data.rows import BEGINNING, Mark, Read, Role, count
from qlora_cli.errors import Exit, UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class HubData:
    """One split of a data set of the hub; name is its configuration."""

    path: str
    name: str | None
    split: str
    streaming: bool = False

    def place(self, number: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.path}[{self.split}]:row {number}"

    def read(self, start: Mark = BEGINNING) -> Iterator[Read]:
        """The rows behind `start`, as DataFile.read gives them.

        What it costs to go on in the middle: nothing out of the cache. Streamed, the file of the hub in which the place
        lies is read up to it, without the files before it and without converting its rows; where `start` has no state,
        or one of another version of `datasets`, every row before it is read.
        Raises UserError where the hub does not give the rows, with Exit.ENVIRONMENT where it is not reached.
        """
        with given_by_hub(self.path):
            rows = _stream(self._load(), start) if self.streaming else _stored(self._load(), start)
            for number, value, after in rows:
                yield Read(number, as_row(value, self.place(number)), after)

    def digest(self) -> str:
        """SHA-256, in hex, of what `datasets` names the rows by (the hub's commit is in it), not of the rows."""
        with given_by_hub(self.path):
            version = self._version() if self.streaming else [self._load()._fingerprint]
        return hashlib.sha256(json.dumps([self.path, self.name, self.split, *version]).encode()).hexdigest()

    def _load(self) -> Dataset | IterableDataset:
        """A data set of its own: a streamed one remembers where it was read up to."""
        import datasets

        options = {"streaming": True} if self.streaming else {}
        return datasets.load_dataset(self.path, self.name, split=self.split, **options)

    def _version(self) -> list[str]:
        """What the cache would file the rows under; a streamed data set has no fingerprint."""
        import datasets

        builder = datasets.load_dataset_builder(self.path, self.name)
        return [str(part) for part in (builder.dataset_name, builder.config_id, builder.config.version, builder.hash)]


def default_split(path: str, name: str | None, role: Role) -> str:
    """`train` for training; for evaluation `test`, else `validation`: which the hub has is asked for."""
    import datasets

    wanted = ("train",) if role == "train" else ("test", "validation")
    with given_by_hub(path):
        splits = datasets.get_dataset_split_names(path, name)
        found = [split for split in wanted if split in splits]
        if not found:
            raise ValueError(f"it has no split {' or '.join(wanted)}, only {', '.join(splits)}")
    return found[0]


def _stored(dataset: Dataset, start: Mark) -> Iterator[Read]:
    """The rows of a data set in the cache."""
    if start.number > len(dataset):
        raise ValueError(f"it has {count(len(dataset), 'row')}, fewer than were read of it before")
    rest = dataset.skip(start.number) if 0 < start.number < len(dataset) else () if start.number else dataset
    for number, row in enumerate(rest, start.number + 1):
        yield Read(number, row, Mark(number))


def _stream(dataset: IterableDataset, start: Mark) -> Iterator[Read]:
    """The rows of a streamed data set, each with the state behind it: some 400 characters, some 20 µs.

    A state of another version of `datasets` is not used, as if there were none.
    """
    import datasets

    version, state = json.loads(start.state) if start.state else (None, None)
    if version == datasets.__version__:
        dataset.load_state_dict(state)
    rows = iter(dataset) if version == datasets.__version__ else islice(dataset, start.number, None)
    for number, row in enumerate(rows, start.number + 1):
        yield Read(number, row, Mark(number, state=json.dumps([datasets.__version__, dataset.state_dict()])))


@contextmanager
def given_by_hub(path: str) -> Iterator[None]:
    """Turns what `datasets` raises into a UserError; a UserError passes."""
    import pyarrow  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError) as error:
        what = f"is no local file, and the hub does not give it: {first_line(error)}"  # the hub's HTTP errors: OSErrors
        todo = "check the id, the name and the split, or download the rows and name the file"
        code = Exit.ENVIRONMENT if isinstance(error, ConnectionError) else Exit.USAGE
        raise UserError(path, what, todo, code) from error
