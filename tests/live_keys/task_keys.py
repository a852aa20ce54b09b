"""The keys of the tasks besides causal_lm: seen in the model's class and in the rows that a session holds."""

from __future__ import annotations

import json
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from tests.live_keys.bench import Bench, Live, becomes
from tests.live_keys.data_keys import examples_of, whole_row

ANSWERS = {"text": ["squad"], "answer_start": [5]}
TASK_ROWS: dict[str, list[dict[str, Any]]] = {
    "source_target": [
        {"source": "say", "target": "from source_target", "instruction": "a", "input": "b", "output": "c"}
    ],
    "classification": [{"text": "from classification", "label": at % 2} for at in range(4)],
    "squad": [
        {"text": "a", "question": "say", "context": f"from squad {' '.join(map(str, range(40)))}", "answers": ANSWERS}
    ],
    "named": [{"text": "say", "text_pair": "so", "label": name} for name in ("a", "b")],
}
"""Rows that causal_lm, or `auto`, reads otherwise."""

OF_TASK = {
    "source_target": {"model.task": "seq2seq_lm", "model.name_or_path": "$t5"},
    "classification": {"model.task": "sequence_classification", "model.num_labels": 2},
    "squad": {"model.task": "question_answering"},
}
"""What a recipe needs for rows of a format; what is not spelled out is the tiny Llama."""


def lines_of(name: str) -> str:
    return "".join(json.dumps(row) + "\n" for row in TASK_ROWS[name])


def model_class(bench: Bench, recipe: Recipe) -> str:
    """The class of the base, or that it cannot do the task."""
    try:
        return type(bench.prepared(recipe).base.model).__name__
    except UserError as error:
        return "refused" if "cannot do" in str(error) else str(error)


def num_classes(bench: Bench, recipe: Recipe) -> int:
    """Rows of the head's weight."""
    head = bench.prepared(recipe).base.model.score
    return len(getattr(head, "original_module", head).weight)


def targets(bench: Bench, recipe: Recipe) -> list[tuple[float, ...]]:
    return [row.targets for row in examples_of("train", bench, recipe).rows]


def shared_tokens(bench: Bench, recipe: Recipe) -> int:
    """Tokens of the second window that the first ends with."""
    first, second = (row.input_ids[row.segment :] for row in examples_of("train", bench, recipe).rows[:2])
    return max(size for size in range(len(second)) if first[len(first) - size :] == second[:size])


def reads(role: str, name: str) -> Live:
    """The format of a source; where the task has no other, beside what causal_lm makes of the same row."""
    other = "eval" if role == "train" else "train"
    rows = {f"data.{role}[0].path": f"$task_{name}", f"data.{other}": [{"path": f"$also_{name}"}]}
    needs = OF_TASK[name]
    beside, along = ({**needs, **rows}, {}) if name == "source_target" else (rows, needs)
    see = whole_row(role)

    def right(without: str, with_value: str) -> bool:
        return f"read as {name}" in with_value and f"from {name}" in with_value and f"read as {name}" not in without

    return Live(f"data.{role}[0].format", name, see, right, beside, along)


def pair(role: str) -> Live:
    """The second text of a template."""
    template = {"prompt": "{{ text }}", "completion": "{{ label }}"}
    sources = {
        f"data.{one}": [{"path": f"${name}", "template": template}]
        for one, name in zip(
            (role, "eval" if role == "train" else "train"), ("task_classification", "also_classification"), strict=True
        )
    }
    beside = {**OF_TASK["classification"], **sources}
    see = whole_row(role)
    return Live(
        f"data.{role}[0].template.pair",
        "{{ label }}th pair",
        see,
        lambda without, with_value: "0th pair" in with_value and "0th pair" not in without,
        beside,
    )


NAMED = {"model.task": "sequence_classification", "data.train[0].path": "$task_named", "data.eval": []}
QUESTIONS = {"model.task": "question_answering", "data.train[0].path": "$task_squad", "data.eval": []}

TASKS = [
    Live(
        "model.task",
        "question_answering",
        model_class,
        becomes("LlamaForCausalLM", "LlamaForQuestionAnswering"),
        {"data.train[0].path": "$task_squad", "data.eval": []},
    ),
    Live(
        "model.task",
        "sequence_classification",
        model_class,
        becomes("LlamaForCausalLM", "LlamaForSequenceClassification"),
        {"data.train[0].path": "$task_classification", "data.eval": []},
        {"model.num_labels": 2},
    ),
    Live(
        "model.task",
        "seq2seq_lm",
        model_class,
        becomes("refused", "T5ForConditionalGeneration"),
        {"model.name_or_path": "$t5", "data.train[0].path": "$format_prompt_completion", "data.eval": []},
    ),
    Live(
        "model.num_labels",
        3,
        num_classes,
        becomes(2, 3),
        {**OF_TASK["classification"], "data.train[0].path": "$task_classification", "data.eval": []},
    ),
    Live(
        "model.labels", ["b", "a"], targets, becomes([(0,), (1,)], [(1,), (0,)]), {**NAMED, "model.labels": ["a", "b"]}
    ),
    Live(
        "data.doc_stride", 9, shared_tokens, becomes(4, 9), {**QUESTIONS, "data.max_length": 60, "data.doc_stride": 4}
    ),
    *(reads(role, name) for role in ("train", "eval") for name in OF_TASK),
    *map(pair, ("train", "eval")),
]
