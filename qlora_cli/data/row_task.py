"""What a row is read and encoded for: the task, with the classes or the windows that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.data.rows import count

if TYPE_CHECKING:
    from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class RowTask:
    """The task of a recipe, as far as its rows depend on it.

    name:       model.task.
    labels:     names of the classes, in the order of their ids; empty where rows hold ids or numbers.
    num_labels: classes; 1: a number is predicted (regression); 0: not a classification.
    doc_stride: tokens that two windows of a long context share.
    """

    name: str = "causal_lm"
    labels: tuple[str, ...] = ()
    num_labels: int = 0
    doc_stride: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> RowTask:
        """The recipe's task."""
        model = recipe.model
        num_labels = len(model.labels) or model.num_labels or 0
        return cls(model.task, tuple(model.labels), num_labels, recipe.data.doc_stride)

    @property
    def ends_with_stop(self) -> bool:
        """Whether what is trained is text, whose end the model has to learn."""
        return self.name in ("causal_lm", "seq2seq_lm")


CAUSAL_LM = RowTask()

NO_TEXT = {"sequence_classification": ("label", 1), "question_answering": ("answer span", 2)}
"""What the tasks that train no text learn from, and how many targets one of it is."""


def trained_in_words(task: str, num_trained: int, num_tokens: int, digits: int = 1) -> str:
    """'9 trained (19.6%)' of so many tokens; '4 labels' where no token is trained."""
    if task not in NO_TEXT:
        return f"{num_trained:,} trained ({num_trained / max(num_tokens, 1):.{digits}%})"
    noun, targets = NO_TEXT[task]
    return count(num_trained // targets, noun)
