"""Sources to examples within the limits: what is kept, cut, left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import LONG_ROWS, Examples, Limits, load_examples
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data

SHARED = Path(__file__).parents[3] / "shared/data"
SHORT = {"question": "How many?", "answer": "42"}
LONG = {"question": "How many clips?", "answer": "the answer of the question is forty two clips"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def load(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: list[dict[str, Any]], **data: Any) -> Examples:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Data.model_validate({"train": [{"path": str(path)}], **data})
    return load_examples(recipe.train, recipe, tokenizer, frozenset({4}), "train")


def refusal(*arguments: Any, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **data)
    return str(caught.value)


def trained(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE_INDEX]


def test_rows_become_examples_with_their_places_and_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples = load(tokenizer, tmp_path, [SHORT, LONG])
    assert [example.where for example in examples.rows] == [f"{tmp_path}/data.jsonl:1", f"{tmp_path}/data.jsonl:2"]
    assert tokenizer.decode(trained(examples.rows[0])) == "42<|im_end|>"
    assert examples.num_rows == 2
    assert examples.num_tokens == sum(len(example.input_ids) for example in examples.rows)
    assert examples.num_trained == sum(len(trained(example)) for example in examples.rows)
    assert examples.summary() == [
        f"{tmp_path}/data.jsonl: 2 rows, format question_answer (by its columns)",
        f"2 examples, {examples.num_tokens} tokens, {examples.num_trained} trained "
        f"({examples.num_trained / examples.num_tokens:.0%})",
    ]


def test_sources_follow_each_other_each_with_its_format(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(SHORT) + "\n" + json.dumps(LONG))
    (tmp_path / "b.csv").write_text("text,question,answer\nOnce,a,b\n")
    sources = [
        {"path": str(tmp_path / "b.csv"), "format": "text"},
        {"path": str(tmp_path / "a.jsonl"), "limit": 1},
    ]
    data = Data.model_validate({"train": sources})
    examples = load_examples(data.train, data, tokenizer, frozenset({4}), "train")
    assert [tokenizer.decode(trained(example)) for example in examples.rows] == ["Once</s>", "42<|im_end|>"]
    assert [str(source) for source in examples.sources] == [
        f"{tmp_path}/b.csv: 1 row, format text",
        f"{tmp_path}/a.jsonl: 1 row, format question_answer (by its columns)",
    ]
    assert load_examples(data.eval, data, tokenizer, frozenset(), "eval") == Examples()


def test_the_recipes_template_is_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = CHATML.replace("}}\n", "}}:\n", 1).replace("assistant\n", "assistant:\n")
    (tmp_path / "t.jinja").write_text(text)
    examples = load(tokenizer, tmp_path, [SHORT], chat_template=str(tmp_path / "t.jinja"))
    assert "<|im_start|>user:\nHow many?" in tokenizer.decode(examples.rows[0].input_ids)


def test_too_long_rows_are_an_error_that_names_the_first_the_longest_and_the_limit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    longer = {**LONG, "answer": LONG["answer"] * 2}
    lengths = [example.num_tokens for example in load(tokenizer, tmp_path, [SHORT, LONG, longer]).rows]
    prompt = load(tokenizer, tmp_path, [LONG]).rows[0].num_prompt
    message = refusal(tokenizer, tmp_path, [SHORT, LONG, longer], max_length=lengths[0])
    assert message == (
        f"{tmp_path}/data.jsonl:2: the row has {lengths[1]} tokens ({prompt} before the answer), "
        f"but data.max_length is {lengths[0]}; in all 2 of 3 rows are too long, the longest has "
        f"{lengths[2]} tokens ({prompt} before the answer) ({tmp_path}/data.jsonl:3). "
        "Raise the limit, or set data.on_long_row to truncate or skip."
    )
    assert load(tokenizer, tmp_path, [SHORT, LONG, longer], max_length=lengths[2]).num_truncated == 0


def test_too_long_rows_are_skipped_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    limit = load(tokenizer, tmp_path, [SHORT]).num_tokens
    examples = load(tokenizer, tmp_path, [LONG, SHORT, LONG], max_length=limit, on_long_row="skip")
    assert (len(examples.rows), examples.num_skipped, examples.num_rows) == (1, 2, 3)
    assert "2 rows skipped: too long" in examples.summary()


def test_truncation_keeps_the_first_tokens_and_counts_what_is_lost(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (whole,) = load(tokenizer, tmp_path, [LONG]).rows
    limit = whole.num_tokens - 4
    examples = load(tokenizer, tmp_path, [LONG, SHORT], max_length=limit, on_long_row="truncate")
    assert examples.rows[0].input_ids == whole.input_ids[:limit]
    assert examples.rows[0].labels == whole.labels[:limit]
    assert (examples.num_truncated, examples.num_cut_tokens, examples.num_lost_stops) == (1, 4, 1)
    assert "1 row truncated: 4 tokens cut, 1 end-of-turn token lost" in examples.summary()
    trailing = load(tokenizer, tmp_path, [LONG], max_length=whole.num_tokens - 1, on_long_row="truncate")
    assert (trailing.num_cut_tokens, trailing.num_lost_stops) == (1, 0)  # the line break behind <|im_end|>


def test_a_row_that_loses_its_whole_answer_is_left_out_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    limit = load(tokenizer, tmp_path, [SHORT]).num_tokens
    hopeless = {"question": "How many clips? " * 9, "answer": "42"}
    examples = load(tokenizer, tmp_path, [hopeless, SHORT], max_length=limit, on_long_row="truncate")
    assert (len(examples.rows), examples.num_emptied, examples.num_truncated) == (1, 1, 0)
    assert "1 row left out: truncation left no trained token" in examples.summary()


@pytest.mark.parametrize("policy", ["truncate", "skip"])
def test_no_row_left_is_an_error(policy: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    message = refusal(tokenizer, tmp_path, [SHORT, LONG], max_length=3, on_long_row=policy)
    assert message.startswith("data.train: no row is left of 2: data.max_length is 3, and each is too long or loses")


def test_prompt_and_answer_have_limits_of_their_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (whole,) = load(tokenizer, tmp_path, [LONG]).rows
    limits = {"source_max_length": 5, "target_max_length": 3}
    (cut,) = load(tokenizer, tmp_path, [LONG], max_length=2, on_long_row="truncate", **limits).rows
    assert cut.input_ids == whole.input_ids[:5] + whole.input_ids[whole.num_prompt :][:3]
    assert cut.labels == [IGNORE_INDEX] * 5 + cut.input_ids[5:]
    message = refusal(tokenizer, tmp_path, [LONG], **limits)
    assert "but data.source_max_length is 5 and target_max_length 3; in all 1 of 1 rows" in message


@pytest.mark.parametrize(("one", "other"), [("source", "target"), ("target", "source")])
def test_one_limit_of_prompt_and_answer_needs_the_other(
    one: str, other: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    message = refusal(tokenizer, tmp_path, [LONG], **{f"{one}_max_length": 5})
    assert message.startswith(f"data.{other}_max_length: is not set, but {one}_max_length is")


def test_a_row_without_a_trained_token_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    message = refusal(tokenizer, tmp_path, [{"text": "a"}, {"text": ""}])
    assert message.startswith(f"{tmp_path}/data.jsonl:2: nothing to train: the row's first token is its last")


def test_empty_answers_and_lost_characters_are_counted(tmp_path: Path) -> None:
    pieces = tiny_tokenizer("pieces")
    examples = load(pieces, tmp_path, [SHORT, {**SHORT, "answer": ""}])
    assert examples.num_silent == 1
    assert "1 row with an empty answer: trained to say nothing" in examples.summary()
    pieces.backend_tokenizer.model.byte_fallback = False
    examples = load(pieces, tmp_path, [SHORT, {**SHORT, "answer": "🤗 é é"}, {**SHORT, "answer": "🤗"}])
    assert examples.lost_characters == (("🤗", 2), ("é", 1))
    assert examples.summary()[-1] == "2 characters lost, the tokenizer cannot write them: '🤗' in 2 rows, 'é' in 1 row"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 12),
    st.booleans(),
    st.integers(1, 15),
    st.integers(1, 15),
)
def test_limits_hold_and_cut_only_what_is_too_long(
    prompt: int, answer: int, apart: bool, first: int, second: int
) -> None:
    ids = list(range(prompt + answer))
    example = Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:], "")
    limits = Limits(None, first, second) if apart else Limits(first, None, None)
    cut = limits.cut(example)
    assert len(cut.input_ids) == len(cut.labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(cut.input_ids, cut.labels, strict=True))
    if apart:
        assert cut.input_ids == ids[: min(prompt, first)] + ids[prompt : prompt + second]
    else:
        assert cut.input_ids == ids[:first]
    assert (cut is example) == (cut.input_ids == ids)


def test_every_policy_of_the_recipe_is_in_the_table() -> None:
    assert set(LONG_ROWS) == set(Data.model_fields["on_long_row"].annotation.__args__)


# ── real data ────────────────────────────────────────────────────────────────────────────────────────────────────────

REAL = {
    "text/gsm8k/train.jsonl": ("question_answer", 7473),
    "text/gsm8k/test.jsonl": ("question_answer", 1319),
    "text/llamafactory/alpaca_en_demo.json": ("alpaca", 999),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("template", [CHATML, None], ids=["chatml", "no template"])
def test_real_files_train_exactly_their_answers(name: str, template: str | None) -> None:
    smollm = SHARED / "tokenizers/smollm2-135m-instruct/tokenizer.json"
    if not (SHARED / name).exists() or not smollm.exists():
        pytest.skip(f"no {SHARED / name}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(smollm), eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = template
    data = Data.model_validate({"train": [{"path": str(SHARED / name), "limit": 1500}]})
    examples = load_examples(data.train, data, tokenizer, frozenset(), "train")
    format_name, num_rows = REAL[name]
    assert examples.sources[0].format == format_name
    assert examples.num_rows == min(num_rows, 1500)
    content = (SHARED / name).read_text(encoding="utf-8")
    rows = json.loads(content) if name.endswith(".json") else [json.loads(line) for line in content.splitlines()]
    space = " " if template is None and format_name == "question_answer" else ""
    answers = tokenizer.batch_decode([trained(example) for example in examples.rows])
    assert answers == [f"{space}{row.get('answer', row.get('output'))}<|im_end|>" for row in rows[:1500]]
