"""The suites `generate` and `classify`: answers beside references, scored by the metrics of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.data.rows import count
from qlora_cli.errors import UserError
from qlora_cli.evaluate.generate import Decoding, generate_answers, prompt_and_reference
from qlora_cli.evaluate.metrics import METRICS, Metric, regex_metric
from qlora_cli.evaluate.suite import Answer, Context, Opened, name_of, no_rows, of_metric, refuse_nonfinite
from qlora_cli.model.base import Base
from qlora_cli.recipe.schema import Suite
from qlora_cli.tasks.table import TASKS, rows_of_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_generate(suite: Suite, context: Context) -> Opened:
    """Answers to the prompts of rows. Rows with the same prompt are one question with several references."""
    examples = context.rows(suite.data)
    asked: dict[tuple[int, ...], list[Example]] = {}
    for row in examples.rows:
        if (pair := prompt_and_reference(row, context.found.tokenizer.bos_token_id)) is not None:
            asked.setdefault(tuple(pair[0]), []).append(row)
    questions = list(islice(asked.values(), context.limit_of(suite)))
    left_out = len(examples.rows) - sum(map(len, asked.values()))
    if not questions:
        raise no_rows(suite) if not examples.rows else _no_prompts(suite)
    evaluation = context.recipe.evaluation
    decoding = Decoding(*(getattr(evaluation, name) for name in Decoding._fields))
    metrics = chosen_metrics(suite, ("exact_match",))
    texts = [[reference_text(context.found.tokenizer, row) for row in rows] for rows in questions]
    for name, metric in metrics.items():
        few = texts[:1] if name.startswith(("rouge", "bleu")) else texts  # these are slow, and read any text
        metric.rows([references[0] for references in few], few)  # what it cannot read is told before anything is asked
    return Opened(
        name_of(suite),
        suite.suite,
        len(questions),
        {"suite": suite.suite, "rows": examples.digest, "number": len(questions), "decoding": list(decoding)},
        partial(_generate, questions, context.batch_size, decoding),
        {name: of_metric(metric, "generated", "references") for name, metric in metrics.items()},
        told=[f"{name_of(suite)}: {count(left_out, 'row')} without a prompt not asked"] if left_out else [],
        sample=lambda answer: {"prompt": answer["prompt"], "expected": answer["references"][0]},
    )


class NothingAsked(UserError):
    """The rows are plain text."""


def _no_prompts(suite: Suite) -> UserError:
    where = f"evaluation.suites: {name_of(suite)}"
    what = "its rows are plain text: nothing is asked"
    return NothingAsked(where, what, "use the suite `loss`, or rows with a prompt")


def chosen_metrics(suite: Suite, default: Sequence[str]) -> dict[str, Metric]:
    """The metrics that the suite names; recipe/suite_rules.py has refused those that are not of its answers."""
    names = suite.metrics or default
    return {name: regex_metric(suite.pattern or "") if name == "regex" else METRICS[name] for name in names}


def _generate(
    questions: Sequence[Sequence[Example]], size: int, decoding: Decoding, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    first = [questions[row][0] for row in todo]
    for at, answer in generate_answers(base, model, first, size, decoding):
        expected = [reference_text(base.tokenizer, row) for row in questions[todo[at]]]
        yield (
            todo[at],
            {"where": answer.where, "prompt": answer.prompt, "generated": answer.generated, "references": expected},
        )


def reference_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The last trained span as text."""
    pair = prompt_and_reference(example)
    assert pair is not None, "rows without a prompt are not asked"
    text: str = tokenizer.decode(pair[1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def open_classify(suite: Suite, context: Context) -> Opened:
    """The class, or the number, that a model gives each row."""
    examples = context.rows(suite.data)
    rows = list(islice(examples.rows, context.limit_of(suite)))
    if not rows:
        raise no_rows(suite)
    numbers = context.recipe.model.num_labels == 1
    metrics = chosen_metrics(suite, ("pearson", "spearman") if numbers else ("accuracy",))
    return Opened(
        name_of(suite),
        suite.suite,
        len(rows),
        {"suite": suite.suite, "rows": examples.digest, "number": len(rows), "labels": context.recipe.model.labels},
        partial(_classify, rows, context.batch_size, list(context.recipe.model.labels)),
        {name: of_metric(metric, "prediction", "label") for name, metric in metrics.items()},
    )


@torch.no_grad()
def _classify(
    rows: Sequence[Example], size: int, names: Sequence[str], base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    lengths = [rows[row].num_tokens for row in todo]
    for few in rows_of_batches(lengths, size, max(lengths, default=0), False, base):
        batch = TASKS[base.task].collate([rows[todo[at]] for at in few], base)
        with base.compute():
            logits, _ = TASKS[base.task].outputs(model, batch)
        refuse_nonfinite(logits, [rows[todo[at]].where for at in few])
        for at, row in zip(few, logits.float().tolist(), strict=True):
            example = rows[todo[at]]
            answer: Answer = {"where": example.where}
            if len(row) == 1:
                answer |= {"prediction": row[0], "label": example.targets[0]}
            else:
                answer |= {"prediction": row.index(max(row)), "label": int(example.targets[0]), "logits": row}
                if names:
                    answer |= {"predicted": names[answer["prediction"]], "expected": names[answer["label"]]}
            yield todo[at], answer
