"""The suite `loss` is lm-evaluation-harness's log-likelihood, row by row, and training's own loss."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import UserError
from qlora_cli.evaluate.generate import prompt_and_reference
from qlora_cli.evaluate.loss import held_out_loss
from qlora_cli.evaluate.measuring import figures
from qlora_cli.evaluate.suite import Answer
from qlora_cli.model.base import Base
from qlora_cli.recipe.schema import Source
from tests.conftest import conversation
from tests.evaluate.choices import some_text
from tests.evaluate.opening import answers_of, base_of, context, opened, recipe_of, write

TEXTS = [
    "One short line.",
    "",
    "Łódź, 東京 and Ünal: " + "a mat with rain 🌧 " * 60,  # more bytes than the model reads, several times
    "x",
    "the cat sat on 42 dogs " * 40,
    "é" * 511,
]


def harness_model(base: Base) -> Any:
    """The model in lm-evaluation-harness; no BOS that a tokenizer puts before a text: it would be predicted as well."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=base.model,
        tokenizer=base.tokenizer,
        batch_size=2,
        add_bos_token=False,
        softmax_dtype=torch.float64,
    )


def rolling(base: Base, texts: Sequence[str]) -> list[float]:
    """The harness's log-likelihood of each text."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found: list[float] = harness_model(base).loglikelihood_rolling(asked, disable_tqdm=True)
    return found


def by_text(answers: Sequence[Answer], number: int) -> list[dict[str, float]]:
    """What the windows of each text say together, by the line of the text."""
    sums: list[dict[str, float]] = [defaultdict(float) for _ in range(number)]
    for answer in answers:
        line = int(answer["where"].rpartition(":")[2]) - 1
        for name in ("loss", "bytes", "targets"):
            sums[line][name] += answer[name]
    return sums


def check_texts(model: Path, texts: Sequence[str], file: Path, **data: Any) -> None:
    """Every row and figure is the harness's."""
    source = write(file, [{"text": text} for text in texts])
    recipe = recipe_of({"name_or_path": str(model)}, data={"train": [{"path": "none.jsonl"}], **data})
    base = base_of(recipe)
    suite = opened(recipe, suite="loss", data=[source])
    answers = answers_of(suite, base)
    found, wanted = by_text(answers, len(texts)), rolling(base, texts)
    assert [-row["loss"] for row in found] == pytest.approx(wanted, abs=1e-4, rel=1e-6)
    assert [row["bytes"] for row in found] == [len(text.encode()) for text in texts]
    told = figures(suite, answers)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert told["bits_per_byte"] == pytest.approx(-sum(wanted) / num_bytes / math.log(2), rel=1e-6)
    num_tokens = sum(len(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert told["loss"] == pytest.approx(-sum(wanted) / num_tokens, rel=1e-6)
    assert told["perplexity"] == pytest.approx(math.exp(-sum(wanted) / num_tokens), rel=1e-5)


def test_texts_have_the_harness_s_log_likelihood(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    check_texts(tiny_model, TEXTS, tmp_path / "texts.jsonl")


@pytest.mark.parametrize("name", ["tinystories/tinystories.txt", "wikitext-2/valid.txt"])
def test_real_texts_have_the_harness_s_log_likelihood(shared: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("lm_eval")
    text = (shared / "text" / name).read_text(encoding="utf-8")[:20000]
    texts = [text[:4000], *[one for one in text[4000:].split("\n\n") if one.strip()][:4]]
    check_texts(shared / "weights" / "stories260k-hf", texts, tmp_path / "texts.jsonl")


def prompts(number: int) -> list[dict[str, Any]]:
    import random

    draw = random.Random(1)
    return [conversation(f"{some_text(draw, 9)} {index}?", some_text(draw, 5)) for index in range(number)]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
"""The prompt ends without white space, which the harness would count to the answer."""


def test_answers_have_the_harness_s_log_likelihood_with_the_token_that_ends_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Training learns to stop, so the loss counts the end-of-turn token: it belongs to the harness's continuation."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows = prompts(7)
    data = {"train": [{"path": "none.jsonl"}], "chat_template": str(tmp_path / "t.jinja")}
    recipe = recipe_of({"name_or_path": str(tiny_model)}, data=data)
    base = base_of(recipe)
    suite = opened(recipe, suite="loss", data=[write(tmp_path / "rows.jsonl", rows)])
    answers = answers_of(suite, base)
    texts = [[message["content"] for message in row["messages"]] for row in rows]
    asked = [
        (f"<|im_start|>user:{question}<|im_end|><|im_start|>assistant:", f"{answer}<|im_end|>")
        for question, answer in texts
    ]
    found = harness_model(base).loglikelihood([Instance("loglikelihood", {}, each, 0) for each in asked])
    assert [-answer["loss"] for answer in answers] == pytest.approx([logprob for logprob, _ in found], abs=1e-4)
    assert [answer["correct"] == answer["targets"] for answer in answers] == [greedy for _, greedy in found]
    assert [answer["bytes"] for answer in answers] == [len(answer.encode()) for _, answer in texts]


def test_real_answers_have_the_harness_s_log_likelihood(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    stories = (shared / "text" / "tinystories" / "tinystories.txt").read_text(encoding="utf-8").split("\n\n")[:6]
    rows = [{"prompt": story[:40], "completion": story[40:200]} for story in stories]
    recipe = recipe_of({"name_or_path": str(shared / "weights" / "stories260k-hf")})
    base = base_of(recipe)
    source = write(tmp_path / "rows.jsonl", rows)
    answers = answers_of(opened(recipe, suite="loss", data=[source]), base)
    examples = context(recipe).rows([Source.model_validate(source)]).rows
    pairs = [pair for example in examples if (pair := prompt_and_reference(example)) is not None]
    wanted = harness_model(base)._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    assert len(answers) == len(wanted) == 6
    assert [-answer["loss"] for answer in answers] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-4)


# ── every task ───────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS: dict[str, list[dict[str, Any]]] = {
    "causal_lm": prompts(9),
    "seq2seq_lm": [{"prompt": "say " + "na " * index, "completion": f"batman {index}"} for index in range(9)],
    "sequence_classification": [{"text": "so " * index, "label": index % 3} for index in range(1, 10)],
    "numbers": [{"text": "so " * index, "label": index / 2} for index in range(1, 10)],
    "question_answering": [
        {
            "id": str(index),
            "question": "who?",
            "context": f"{'it rains ' * (index % 4)}Ann sat",
            "answers": {"text": ["Ann"], "answer_start": [9 * (index % 4)]},
        }
        for index in range(9)
    ],
}
MODELS = {
    "causal_lm": "llama",
    "seq2seq_lm": "bart",
    "sequence_classification": "bert",
    "numbers": "roberta",
    "question_answering": "bert",
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_loss_is_training_s_and_does_not_change_with_the_batch_size(
    kind: str, architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    task = "sequence_classification" if kind == "numbers" else kind
    model: dict[str, Any] = {"name_or_path": str(architecture(MODELS[kind])), "task": task}
    if task == "sequence_classification":
        model |= {"num_labels": 1} if kind == "numbers" else {"labels": ["no", "perhaps", "yes"]}
    source = write(tmp_path / "rows.jsonl", ROWS[kind])
    data = {"train": [{"path": "none.jsonl"}], "max_length": 64}
    if task == "causal_lm":
        data["on_long_row"] = "truncate"
    told = []
    for size in (1, 4, 100):
        recipe = recipe_of(model, data=data, evaluation={"batch_size": size})
        base = base_of(recipe)
        suite = opened(recipe, suite="loss", data=[source])
        told.append(figures(suite, answers_of(suite, base)))
    examples = context(recipe).rows([Source.model_validate(source)])
    wanted = held_out_loss(base, base.model, examples.rows, 1)
    for found in told:
        assert found == pytest.approx(told[0], rel=1e-5)
        assert found["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        if "token_accuracy" in found:
            assert found["token_accuracy"] == wanted.accuracy
    assert ("bits_per_byte" in told[0]) == (task in ("causal_lm", "seq2seq_lm"))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_texts_do_not_change_with_the_batch_size(tiny_model: Path, tmp_path: Path, size: int) -> None:
    source = write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    told = []
    for each in (2, size):
        recipe = recipe_of({"name_or_path": str(tiny_model)}, evaluation={"batch_size": each})
        suite = opened(recipe, suite="loss", data=[source])
        told.append(answers_of(suite, base_of(recipe)))
    for one, other in zip(*told, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3, rel=1e-6)
        assert one["where"] == other["where"]


def test_max_length_bounds_the_windows(tiny_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", [{"text": "a" * 100}])
    data = {"train": [{"path": "none.jsonl"}], "max_length": 40}
    recipe = recipe_of({"name_or_path": str(tiny_model)}, data=data)
    suite = opened(recipe, suite="loss", data=[source])
    assert suite.num_rows == 3
    longer = opened(recipe_of({"name_or_path": str(tiny_model)}), suite="loss", data=[source])
    assert (longer.num_rows, longer.digest != suite.digest) == (1, True)


def test_a_limit_is_of_rows(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"name_or_path": str(tiny_model)})
    source = write(tmp_path / "rows.jsonl", prompts(5))
    assert opened(recipe, suite="loss", data=[source], limit=3).num_rows == 3
    assert opened(recipe, limit=2, suite="loss", data=[source]).num_rows == 2


def test_nothing_to_measure_is_told(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"name_or_path": str(tiny_model)})
    with pytest.raises(UserError, match=r"evaluation.suites: held: no rows\. Name files in its `data`, or hold rows"):
        opened(recipe, suite="loss", name="held")
    source = write(tmp_path / "texts.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"evaluation.suites: loss: no rows"):
        opened(recipe, suite="loss", data=[source])
