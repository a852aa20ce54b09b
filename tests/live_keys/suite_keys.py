"""The keys of evaluation: seen in what `qlora eval` tells and writes of every row, and in what a run measures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from qlora_cli.data.formats import FORMATS
from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from tests.live_keys.bench import Bench, Live, Measured, becomes
from tests.live_keys.data_keys import asked_of_the_hub, streamed_from_the_hub
from tests.live_keys.task_keys import OF_TASK
from tests.live_keys.training_keys import logged
from tests.tiny import tiny_tokenizer

SUITE, SOURCE = "evaluation.suites[0]", "evaluation.suites[0].data[0]"
HUB = "someone/rows"


def quiz(number: int, label: str) -> str:
    """Questions with choices; each has `label` and its number in it."""
    rows = [{"query": f"{label} {at}", "choices": [f"yes {at}", "no"], "gold": at % 2} for at in range(number)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def harness_task(name: str, rows: Path) -> str:
    """A task of lm-evaluation-harness over a quiz."""
    files = {"data_files": {"test": str(rows)}, "cache_dir": str(rows.parent / "harness")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    asked = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    return yaml.safe_dump({**task, "output_type": "multiple_choice", **asked, "metric_list": metrics})


def write_suite_rows(folder: Path) -> dict[str, Path]:
    """The files that the suites below name."""
    written = {"quiz.jsonl": quiz(4, "asked"), "solved.jsonl": quiz(4, "solved")}
    written |= {f"{name}.yaml": harness_task(name, folder / "quiz.jsonl") for name in ("one", "two")}
    for name, content in written.items():
        (folder / name).write_text(content)
    return {name.split(".")[0]: folder / name for name in written}


# ── what is looked at ────────────────────────────────────────────────────────────────────────────────────────────────


def of_eval(see: Callable[[Measured], Any]) -> Callable[[Bench, Recipe], Any]:
    """Something seen in `qlora eval` of the untrained base."""
    return lambda bench, recipe: see(bench.measured(recipe))


def figure_names(measured: Measured) -> set[str]:
    return set(measured.figures)


def only_figure(measured: Measured) -> float:
    (figure,) = measured.figures.values()
    return float(figure["value"])


def column(name: str) -> Callable[[Measured], list[Any]]:
    """A column of the answers, None where they have no such."""
    return lambda measured: [answer.get(name) for answer in measured.answers]


def first_characters(measured: Measured) -> set[str]:
    """What the choices begin with."""
    return {choice[0] for answer in measured.answers for choice in answer["choices"]}


def rows_of(measured: Measured) -> dict[str, int]:
    """How many rows are measured of each file."""
    return dict(Counter(Path(answer["where"].rpartition(":")[0]).name for answer in measured.answers))


def written(measured: Measured) -> list[str]:
    """The files of the run's folder eval/."""
    return sorted(path.name for path in (measured.watch.folder / "eval").iterdir())


def told(measured: Measured) -> set[str]:
    """What is told of each figure."""
    return {name for figure in measured.figures.values() for name in figure}


def largest_step(measured: Measured) -> int:
    """The most answers that are written at once, a token each."""
    return max(len(ids) for ids in measured.watch.inputs if ids.shape[1] == 1)


def repeats(measured: Measured) -> bool:
    """Whether a token of the only answer, the last one left out, is written twice."""
    written = [ids.item() for ids in measured.watch.inputs if ids.shape == (1, 1)]
    assert len(written) > 20, "an answer too short to tell"
    return len(set(written)) < len(written)


def length(measured: Measured) -> int:
    """Characters of all answers."""
    return sum(len(answer["generated"]) for answer in measured.answers)


def longest_answer(measured: Measured) -> int:
    return max(len(answer["prediction"]) for answer in measured.answers)


def read_text(measured: Measured) -> str:
    """All that the model reads."""
    ids = [token for batch in measured.watch.inputs for token in batch.flatten().tolist()]
    return str(tiny_tokenizer().decode(ids))


def asked_and_expected(bench: Bench, recipe: Recipe) -> str:
    """Prompt and reference of the first row, or the error."""
    try:
        answer = bench.measured(recipe).answers[0]
    except UserError as error:
        return str(error)
    return str(answer["prompt"] + "".join(answer["references"]))


def step_of_the_adapter(bench: Bench, recipe: Recipe) -> list[int]:
    """The steps whose checkpoint holds the weights of the run's adapter."""
    run = bench.trained(recipe).folder
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")

    def is_it(checkpoint: Path) -> bool:
        weights = load_file(next(checkpoint.rglob("adapter_model.safetensors")))
        return all(adapter[name].equal(weight) for name, weight in weights.items())

    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir()) if is_it(path)]


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def suites(suite: str, path: str | None = None, template: Any = None, **keys: Any) -> dict[str, Any]:
    """A recipe's only suite, called `it`, over a file or the held-out rows."""
    data = {"data": [{"path": path, "template": template}]} if path else {}
    return {"evaluation.suites": [{"suite": suite, "name": "it", **data, **keys}]}


def gets(sign: str) -> Callable[[str, str], bool]:
    """With the value, and only with it, the sign is in the text."""
    return lambda without, with_value: sign in with_value and sign not in without


def another_reading(name: str) -> Callable[[str, str], bool]:
    """The row is read otherwise than its columns choose, and its answer is that of the format's own columns."""
    return lambda without, with_value: without != with_value and f"from {name}" in with_value


ONE_TOKEN = {"evaluation.max_new_tokens": 1}
LOSS, HELD_OUT, CHOICE = suites("loss"), suites("loss", "$heldout"), suites("choice", "$quiz")
GENERATE = {**suites("generate"), **ONE_TOKEN}
COLUMNS = suites("generate", "$columns", template={"prompt": "some ", "completion": "y"}) | ONE_TOKEN
HARNESS = suites("lm_eval", tasks=["$one"])
MATCHED = suites("generate", metrics=["regex"], pattern="no such words") | ONE_TOKEN
FROM_HUB = suites("loss", HUB)
TRAINED = {name: {"data.train[0].path": f"$task_{name}", "data.eval": []} for name in OF_TASK}
OF = {name: {**needs, **TRAINED[name]} for name, needs in OF_TASK.items()}
PAIRED = suites("classify", "$also_classification", template={"prompt": "{{ text }}", "completion": "{{ label }}"})
IN_TRAINING = {"evaluation.during_training": ["it"], "training.eval_steps": 2, "training.save_steps": 2}
NEVER_BETTER = {**GENERATE, **IN_TRAINING}  # one token is no answer
LOSSES = {"loss", "perplexity", "bits_per_byte", "token_accuracy"}
HUB_ROWS = asked_of_the_hub(Bench.measure_anew)


def kind(name: str, figures: set[str], other: set[str], beside: Mapping[str, Any], along: Mapping[str, Any]) -> Live:
    """A suite by its figures, beside those of another one."""
    return Live(f"{SUITE}.suite", name, of_eval(figure_names), becomes(other, figures), beside, along)


def reads_as(name: str) -> Live:
    """The format of a suite's source that the columns alone do not choose."""
    if name == "text":
        see, sign = of_eval(read_text), "<|im_end|>from tex"  # a window begins with EOS, its last token is not read
        return Live(f"{SOURCE}.format", name, see, gets(sign), suites("loss", "$format_text"))
    beside = suites("generate", f"$format_{name}") | ONE_TOKEN
    return Live(f"{SOURCE}.format", name, asked_and_expected, another_reading(name), beside)


KINDS = [
    kind("loss", LOSSES, {"exact_match"}, suites("generate", limit=1), {}),
    kind("generate", {"exact_match"}, LOSSES, suites("loss", limit=1), {}),
    kind("choice", {"accuracy", "accuracy_norm", "accuracy_bytes"}, LOSSES, LOSS, CHOICE),
    kind("classify", {"accuracy"}, {"loss"}, {**OF["classification"], **suites("loss", "$also_classification")}, {}),
    kind("squad", {"squad_exact_match", "squad_f1"}, {"loss"}, {**OF["squad"], **suites("loss", "$also_squad")}, {}),
    kind("lm_eval", {"one.acc"}, LOSSES, LOSS, HARNESS),
]

FORMATS_OF_SOURCES = [
    *map(reads_as, FORMATS),
    Live(
        f"{SOURCE}.format",
        "source_target",
        asked_and_expected,
        another_reading("source_target"),
        {**OF["source_target"], **suites("generate", "$also_source_target"), **ONE_TOKEN},
    ),
    Live(
        f"{SOURCE}.format",
        "classification",
        of_eval(column("label")),
        becomes([None] * 4, [0, 1, 0, 1]),
        {**TRAINED["classification"], **suites("loss", "$also_classification")},
        {**OF_TASK["classification"], **suites("classify", "$also_classification")},
    ),
    Live(
        f"{SOURCE}.format",
        "squad",
        of_eval(column("references")),
        becomes([None], [["squad"]]),
        {**TRAINED["squad"], **suites("loss", "$also_squad")},
        {**OF_TASK["squad"], **suites("squad", "$also_squad")},
    ),
]

SOURCES = [
    Live(f"{SOURCE}.path", "$others", of_eval(rows_of), becomes({"heldout.jsonl": 4}, {"others.jsonl": 12}), HELD_OUT),
    Live(f"{SOURCE}.name", "small", HUB_ROWS, becomes((HUB, None, "test"), (HUB, "small", "test")), FROM_HUB),
    Live(f"{SOURCE}.split", "extra", HUB_ROWS, becomes((HUB, None, "test"), (HUB, None, "extra")), FROM_HUB),
    Live(
        f"{SOURCE}.streaming",
        True,
        streamed_from_the_hub(Bench.measure_anew),
        becomes(False, True),
        {**FROM_HUB, f"{SOURCE}.limit": 4},
    ),
    Live(f"{SOURCE}.limit", 3, of_eval(rows_of), becomes({"heldout.jsonl": 4}, {"heldout.jsonl": 3}), HELD_OUT),
    Live(f"{SOURCE}.limit", 3, of_eval(rows_of), becomes({"quiz.jsonl": 4}, {"quiz.jsonl": 3}), CHOICE),
    *(
        Live(f"{SOURCE}.template.{key}", value, asked_and_expected, gets(sign), COLUMNS)
        for key, value, sign in (
            ("prompt", "Data: {{ a }}", "Data: 007"),
            ("completion", " {{ b }}!", " eight!"),
            ("chat", True, "<|im_start|>user"),
        )
    ),
    Live(
        f"{SOURCE}.template.pair",
        "{{ label }}th pair",
        of_eval(read_text),
        gets("0th pair"),
        {**OF["classification"], **PAIRED},
    ),
]

SUITES = [
    *KINDS,
    *FORMATS_OF_SOURCES,
    *SOURCES,
    Live(
        f"{SUITE}.name",
        "mine",
        of_eval(written),
        becomes(["loss.base.jsonl", "loss.json"], ["mine.base.jsonl", "mine.json"]),
        {"evaluation.suites": [{"suite": "loss"}]},
    ),
    Live(f"{SUITE}.metrics", ["squad_f1"], of_eval(figure_names), becomes({"exact_match"}, {"squad_f1"}), GENERATE),
    Live(
        f"{SUITE}.metrics",
        ["macro_f1"],
        of_eval(figure_names),
        becomes({"accuracy"}, {"macro_f1"}),
        {**OF["classification"], **suites("classify", "$also_classification")},
    ),
    Live(f"{SUITE}.pattern", "(?s).", of_eval(only_figure), becomes(0.0, 1.0), MATCHED),
    Live(f"{SUITE}.delimiter", "\n", of_eval(first_characters), becomes({" "}, {"\n"}), CHOICE),
    Live(f"{SUITE}.shots", 1, of_eval(read_text), gets("\n\nasked"), CHOICE),
    Live(f"{SUITE}.shots_from", "$solved", of_eval(read_text), gets("solved"), {**CHOICE, f"{SUITE}.shots": 1}),
    Live(f"{SUITE}.tasks", ["$two"], of_eval(figure_names), becomes({"one.acc"}, {"two.acc"}), HARNESS),
    Live(f"{SUITE}.limit", 2, of_eval(rows_of), becomes({"heldout.jsonl": 4}, {"heldout.jsonl": 2}), HELD_OUT),
    Live(f"{SUITE}.limit", 2, of_eval(rows_of), becomes({"one": 4}, {"one": 2}), HARNESS),
    Live(
        "evaluation.num_beams",
        3,
        of_eval(largest_step),
        becomes(1, 3),
        {**suites("generate", limit=1), "evaluation.max_new_tokens": 4},
    ),
    Live(
        "evaluation.length_penalty",
        -9,
        of_eval(length),
        lambda without, with_value: with_value < without,
        {**suites("generate"), "evaluation.max_new_tokens": 40, "evaluation.num_beams": 8},
    ),
    Live(
        "evaluation.no_repeat_ngram_size",
        1,
        of_eval(repeats),
        becomes(True, False),
        {**suites("generate", limit=1), "evaluation.max_new_tokens": 40},
    ),
    Live(
        "evaluation.max_answer_length",
        1,
        of_eval(longest_answer),
        lambda without, with_value: with_value == 1 < without,
        {**OF["squad"], **suites("squad", "$also_squad")},
    ),
    Live("evaluation.bootstrap_resamples", 0, of_eval(told), becomes({"value", "low", "high"}, {"value"}), LOSS),
    Live("evaluation.during_training", ["it"], logged("it.loss"), becomes([], [6]), LOSS),
    Live("evaluation.best_metric", "it.exact_match", step_of_the_adapter, becomes([6], [2]), NEVER_BETTER),
    Live(
        "evaluation.early_stopping_patience",
        1,
        logged("loss"),
        becomes([1, 2, 3, 4, 5, 6], [1, 2, 3, 4]),
        {**NEVER_BETTER, "evaluation.best_metric": "it.exact_match"},
    ),
]
