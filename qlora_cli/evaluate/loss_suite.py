"""The suite `loss`: how well a model predicts held-out rows, or any text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.sources import SourceMark, read_parts, resolve
from qlora_cli.evaluate.loss import exp
from qlora_cli.evaluate.suite import Answer, Context, Measure, Opened, columns, name_of, no_rows, refuse_nonfinite
from qlora_cli.evaluate.text_windows import TextWindow, text_windows
from qlora_cli.model.base import Base
from qlora_cli.recipe.schema import Source, Suite
from qlora_cli.tasks.causal_lm import Batch, predictions
from qlora_cli.tasks.padding import mask_of, padded
from qlora_cli.tasks.table import TASKS, AnyBatch, rows_of_batches, target_losses

TEXT = ("causal_lm", "seq2seq_lm")


def mean_loss(rows: np.ndarray) -> float:
    """Columns loss, targets."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


MEASURES = {
    "loss": Measure(columns("loss", "targets"), mean_loss, True),
    "perplexity": Measure(columns("loss", "targets"), lambda rows: exp(mean_loss(rows)), True),
    "bits_per_byte": Measure(columns("loss", "bytes"), lambda rows: mean_loss(rows) / math.log(2), True),
    "token_accuracy": Measure(columns("correct", "targets"), mean_loss),
}
"""loss in nats per token; bits_per_byte over the UTF-8 bytes of the trained text."""


def open_loss(suite: Suite, context: Context) -> Opened:
    """Over text files, every token but none twice, in windows as lm-evaluation-harness rolls them; over other rows what
    training would learn of them.

    A text has the harness's `loglikelihood_rolling`, with add_bos_token=False: else a BOS that the tokenizer writes is
    predicted too. An answer has its `loglikelihood` where the continuation ends with the end-of-turn token, which is
    trained, and the prompt without white space, which the harness would count to the continuation.
    """
    if suite.data and context.found.task == "causal_lm" and is_text(suite.data):
        return _open_texts(suite, context)
    examples = context.rows(suite.data)
    rows = list(islice(examples.rows, context.limit_of(suite)))
    if not rows:
        raise no_rows(suite)
    task = context.found.task
    names = ("loss", "perplexity", "bits_per_byte", "token_accuracy") if task in TEXT else ("loss",)
    return Opened(
        name_of(suite),
        suite.suite,
        len(rows),
        {"suite": suite.suite, "rows": examples.digest, "number": len(rows)},
        partial(_answer_rows, rows, context.batch_size),
        {name: MEASURES[name] for name in names},
    )


def is_text(sources: Sequence[Source]) -> bool:
    """Whether the sources are texts alone: by their format, or by the first row's columns."""
    from qlora_cli.data.formats import fitting

    for source in sources:
        parts = resolve(source, "eval").parts
        read = next(read_parts(parts, source, SourceMark()))[1].value
        auto = isinstance(read, dict) and source.template is None and fitting(read) == ["text"]
        if not (source.format == "text" or (source.format == "auto" and auto)):
            return False
    return True


def _open_texts(suite: Suite, context: Context) -> Opened:
    length = min(context.found.context or context.recipe.data.max_length, context.recipe.data.max_length)
    windows = list(text_windows(suite.data, context.found.tokenizer, length, context.limit_of(suite)))
    if not windows:
        raise no_rows(suite)
    made_of = {"suite": suite.suite, "length": length, "windows": [[w.ids, w.num_context] for w in windows]}
    return Opened(
        name_of(suite),
        suite.suite,
        len(windows),
        made_of,
        partial(_answer_windows, windows, context.batch_size),
        MEASURES,
    )


def _answer_rows(
    rows: Sequence[Example], size: int, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    lengths = [rows[row].num_tokens for row in todo]
    for few in rows_of_batches(lengths, size, max(lengths, default=0), False, base):
        examples = [rows[todo[at]] for at in few]
        batch = TASKS[base.task].collate(examples, base)
        for at, example, sums in zip(few, examples, _sums(base, model, batch, examples), strict=True):
            text = base.tokenizer.decode(
                [token for token in example.labels[1:] if token != IGNORE_INDEX],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            yield todo[at], {"where": example.where, **sums, "bytes": len(text.encode())}


@torch.no_grad()
def _sums(base: Base, model: Any, batch: AnyBatch, examples: Sequence[Example]) -> list[dict[str, float]]:
    """Loss, right predictions and targets of each row of the batch."""
    with base.compute():
        losses, correct = _doubles(*target_losses(base, model, batch))
    counts = [example.num_trained for example in examples]
    if base.task == "question_answering":  # all first tokens, then all last ones
        losses, correct = (one.view(2, -1).T.flatten() for one in (losses, correct))
    return _summed(losses, correct, counts, [example.where for example in examples])


def _doubles(losses: Tensor, likeliest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses and right predictions, none of which there are of numbers, (N,) float64."""
    return losses.double(), torch.zeros_like(losses) if likeliest is None else likeliest.double()


def _summed(losses: Tensor, correct: Tensor, counts: Sequence[int], where: Sequence[str]) -> list[dict[str, float]]:
    refuse_nonfinite(torch.stack([part.sum() for part in losses.split(list(counts))]).unsqueeze(1), where)
    parts = zip(losses.split(list(counts)), correct.split(list(counts)), counts, strict=True)
    return [{"loss": a.sum().item(), "correct": b.sum().item(), "targets": n} for a, b, n in parts]


def _answer_windows(
    windows: Sequence[TextWindow], size: int, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    lengths = [len(windows[row].ids) - 1 for row in todo]
    for few in rows_of_batches(lengths, size, max(lengths, default=0), False, base):
        chosen = [windows[todo[at]] for at in few]
        for at, window, sums in zip(few, chosen, _window_sums(base, model, chosen), strict=True):
            yield todo[at], {"where": window.where, **sums, "bytes": window.num_bytes}


@torch.no_grad()
def _window_sums(base: Base, model: Any, windows: Sequence[TextWindow]) -> list[dict[str, float]]:
    """The same of windows, whose last token is predicted and not read."""
    labels = padded([[IGNORE_INDEX] * w.num_context + w.ids[w.num_context :] for w in windows], IGNORE_INDEX)
    inputs = [window.ids[:-1] for window in windows]
    batch = Batch(padded(inputs, 0), mask_of([*map(len, inputs)]), *predictions(labels[:, 1:]))
    with base.compute():
        found = target_losses(base, model, Batch(*(tensor.to(base.device) for tensor in batch)))
    counts = [len(window.ids) - window.num_context for window in windows]
    return _summed(*_doubles(*found), counts, [window.where for window in windows])
