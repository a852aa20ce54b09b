"""Rows of sequence_classification: one text or a pair, with a class or a number."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_cli.data.cuts import encoded, left_out, truncated
from qlora_cli.data.encode import IGNORE_INDEX, Example, begin_of_second
from qlora_cli.data.formats import Format, Formats
from qlora_cli.data.rows import Row, describe, text_of
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_cli.data.chat import Chat
    from qlora_cli.data.limits import Limits
    from qlora_cli.data.row_task import RowTask


class Labelled(NamedTuple):
    """A text, or two, and the label as the row holds it."""

    text: str
    pair: str | None
    label: Any

    @property
    def texts(self) -> tuple[str, ...]:
        """What the tokenizer has to spell."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence",),  # CoLA, SST-2
    ("text",),
    ("sentence1", "sentence2"),  # MRPC, STS-B, RTE, WNLI; MNLI in GLUE's files
    ("premise", "hypothesis"),  # MNLI on the hub, ANLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("text", "text_pair"),
    ("text1", "text2"),
    ("#1 String", "#2 String"),  # MRPC in GLUE's files
)
LABELS = ("label", "score", "gold_label", "is_duplicate", "Quality")
"""Columns that hold the label; the last four as GLUE's files call them in STS-B, MNLI, QQP and MRPC."""

POOLED = ("eos_token", "sep_token", "pad_token", "cls_token")
"""Special tokens by whose place a model finds where to read the class (BART the last EOS, Llama the last non-PAD)."""

_SECRET = "name rows with labels: in GLUE's test sets -1 stands for a label that is kept secret"


def labelled(row: Row, where: str) -> Labelled:
    """The columns of GLUE's tasks, in its own files or on the hub: the largest set of texts that the row has.

    Raises UserError where a second text is null: its column says that rows are pairs.
    """
    texts = max((names for names in TEXTS if _has(row, names)), key=len)
    _refuse_half_a_pair(row, texts, where)
    label = next(row[name] for name in LABELS if row.get(name) is not None)
    first, *second = (text_of(row, name, where) for name in texts)
    return Labelled(first, second[0] if second else None, label)


_WORDS = (
    f"a text ({', '.join(one for one, *two in TEXTS if not two)}) or two "
    f"({', '.join(' and '.join(names) for names in TEXTS if len(names) == 2)}), and a label ({', '.join(LABELS)})"
)
_SETS = tuple((*texts, label) for texts in TEXTS for label in LABELS)
FORMATS = Formats({"classification": Format(_SETS, labelled, words=_WORDS)})


def templated(texts: dict[str, str]) -> Labelled:
    """What a source's template wrote."""
    return Labelled(texts["prompt"], texts.get("pair"), texts["completion"].strip())


def encode(row: Labelled, where: str, chat: Chat, limits: Limits) -> list[tuple[Example, Example]]:
    """The example of a text or a pair with its special tokens, and the same within the limits: the longer one is cut.

    Raises UserError for an empty text, a label that is none of the classes, and a text that spells a special token:
    the model would look for its class at the wrong place.
    """
    targets = (label_of(row.label, chat.settings.task, where),)
    encoding = encoded(chat.tokenizer, row.texts)
    if not all(text.strip() for text in row.texts) or not encoding.ids:
        which = "a text of the pair" if row.pair is not None else "the text"
        raise UserError(where, f"{which} is empty", "give the row a text, or remove it")
    _refuse_special(row, where, chat)
    whole = _example(encoding, targets, where)
    assert limits.max_length is not None, "a pair of limits is for seq2seq_lm"
    if whole.num_tokens <= limits.max_length:
        return [(whole, whole)]
    if limits.on_long_row != "truncate":
        return [(whole, left_out(where))]
    return [(whole, _example(truncated(chat.tokenizer, row.texts, limits.max_length, where), targets, where))]


def _example(encoding: Encoding, targets: tuple[float, ...], where: str) -> Example:
    ids = encoding.ids
    return Example(ids, [IGNORE_INDEX] * len(ids), where, targets, begin_of_second(encoding))


def _refuse_special(row: Labelled, where: str, chat: Chat) -> None:
    """Raises UserError where a text spells a token by whose place the model finds its class."""
    for name in POOLED:
        token = chat.settings.special.get(name)
        if token and any(token in text for text in row.texts):
            raise UserError(where, f"the text spells the special token {token!r}", "mend or remove the row")


def label_of(value: Any, task: RowTask, where: str) -> float:
    """The id of the class, or the number to be predicted. Raises UserError where it is neither.

    Where a class is called by a number, 5, a row holds a name, as a text or a number, and never an id.
    """
    if task.num_labels == 1:
        return _number(value, where)
    if isinstance(value, str | int | float) and str(value) in task.labels:  # in JSON 5 may be a number
        return task.labels.index(str(value))
    if number := _name_that_is_a_number(task.labels):
        what = f"the label is {_seen(value)}, none of the names {', '.join(task.labels)}"
        todo = f"mend the row: rows hold names and no ids, because the name {number} is a number"
        raise UserError(where, what, _SECRET if str(value) == "-1" else todo)
    known = f"one of {', '.join(task.labels)}, or " if task.labels else ""
    try:
        index = int(value) if isinstance(value, str) else value
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < task.num_labels:
            return index
    except ValueError:
        pass
    what = f"the label is {_seen(value)}, not {known}an id from 0 to {task.num_labels - 1}"
    todo = "mend the row, or set model.labels to the names of all classes (or model.num_labels)"
    if str(value) == "-1":
        todo = _SECRET
    raise UserError(where, what, todo)


@lru_cache(maxsize=1)
def _name_that_is_a_number(labels: tuple[str, ...]) -> str | None:
    """The first of the names that could be taken for an id; None where no row's number can be a name."""
    for name in labels:
        try:
            if math.isfinite(float(name)):
                return name
        except ValueError:
            pass
    return None


def _number(value: Any, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        what = f"the label is {_seen(value)}, not a number, and model.num_labels is 1"
        raise UserError(where, what, "mend the row, or set model.labels to the names of the classes")
    return number


def _seen(value: Any) -> str:
    return repr(value) if isinstance(value, str) else describe(value)


def _refuse_half_a_pair(row: Row, texts: tuple[str, ...], where: str) -> None:
    """Raises UserError where the row has these texts, and null in the column of another that would make them a pair."""
    for names in TEXTS:
        if len(names) > len(texts) and row.keys() >= set(names) >= set(texts):
            (absent,) = set(names) - set(texts)
            todo = "give all rows a second text, or read single texts by a template without `pair`"
            raise UserError(where, f"{absent} is null, and its column says that rows are pairs", todo)


def _has(row: Row, names: tuple[str, ...]) -> bool:
    return all(row.get(name) is not None for name in names)
