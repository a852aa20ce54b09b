"""The embedded default is what its script says: a base that answers, a task that it cannot do yet, rows kept apart."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "configs" / "quickstart"
sys.path.insert(0, str(ROOT / "scripts"))

import pretrain_base as script  # noqa: E402
import quickstart_text as text  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(HOME / "base")


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(HOME / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def pretraining() -> list[str]:
    """Everything that is said in the pretraining text."""
    chats = text.chats(script.CHATS_SEED, script.NUM_STEPS * script.BATCH_SIZE)
    return [message["content"] for chat in chats for message in chat]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HOME / name).read_text(encoding="utf-8").splitlines()]


def share_right(got: list[str], expected: list[str]) -> float:
    return sum(a == b for a, b in zip(got, expected, strict=True)) / len(expected)


def test_the_rows_are_those_of_the_generator() -> None:
    assert rows_of("train.jsonl") == text.record_rows(script.TRAIN_SEED, script.NUM_TRAIN_ROWS)
    assert rows_of("heldout.jsonl") == text.record_rows(script.HELDOUT_SEED, script.NUM_HELDOUT_ROWS, new=True)


def test_heldout_rows_are_in_no_training_text_of_either_stage(pretraining: list[str]) -> None:
    heldout, train = rows_of("heldout.jsonl"), rows_of("train.jsonl")
    trained = {message["content"] for row in train for message in row["messages"]} | set(pretraining)
    assert not trained & {message["content"] for row in heldout for message in row["messages"]}
    sentences = {row["messages"][0]["content"].removeprefix("Record: ") for row in heldout}
    assert len(sentences) == len(heldout)
    everything = "\n".join(trained)
    assert not [sentence for sentence in sentences if sentence in everything]
    assert not [word for word in [*text.NEW_NAMES, *text.NEW_ITEMS, *text.NEW_PLACES] if word in everything]
    assert all(json.loads(row["messages"][1]["content"])["who"] in text.NEW_NAMES for row in heldout)


def test_the_pretraining_text_holds_no_record_and_asks_for_none(pretraining: list[str]) -> None:
    assert not [said for said in pretraining if '{"who"' in said or said.startswith("Record")]


def test_the_files_are_small() -> None:
    assert (HOME / "base" / "model.safetensors").stat().st_size < 4e6
    assert sum(path.stat().st_size for path in HOME.glob("*.jsonl")) < 1e6


@pytest.mark.parametrize(
    "said", ["Anna bought 3 red apples.", ' {"who": "Zoë"}\n\n\t 12', "日本語 🙂 \x00 \u202e", "don't"]
)
def test_the_tokenizer_gives_back_what_it_was_given(tokenizer: Any, said: str) -> None:
    assert tokenizer.decode(tokenizer(said).input_ids) == said


def test_the_tokenizer_fits_the_embedding_and_knows_where_a_turn_ends(tokenizer: Any, base: LlamaForCausalLM) -> None:
    assert len(tokenizer) <= base.get_input_embeddings().num_embeddings
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token_id == base.config.eos_token_id == base.generation_config.eos_token_id
    assert tokenizer.pad_token_id == base.config.pad_token_id == base.generation_config.pad_token_id
    assert tokenizer("<|user|>hi<|end|>").input_ids[-1] == tokenizer.eos_token_id


def test_the_template_is_prefix_stable(tokenizer: Any) -> None:
    messages = text.say("one", " two ", "three\n", "four", system="Be <brief>.")
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert full == "<|system|>Be <brief>.<|end|><|user|>one<|end|><|assistant|> two <|end|>" + (
        "<|user|>three\n<|end|><|assistant|>four<|end|>"
    )
    for i, message in list(enumerate(messages))[1:]:
        before = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=message["role"] == "assistant"
        )
        assert full.startswith(before)


def test_the_template_names_a_role_that_it_does_not_know(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="unknown role tool: this template knows system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_weights_load_strictly_in_bfloat16() -> None:
    model, info = LlamaForCausalLM.from_pretrained(HOME / "base", output_loading_info=True)
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert all(width % 64 == 0 for width in widths)  # bitsandbytes' CPU kernel needs whole blocks


def test_the_base_answers_questions_about_people_it_never_read_of(base: LlamaForCausalLM, tokenizer: Any) -> None:
    prompts, expected = zip(*text.heldout_questions(script.QUESTIONS_SEED, 200), strict=True)
    assert share_right(script.answers(base, tokenizer, list(prompts)), list(expected)) > 0.9


def test_the_base_writes_no_record_yet(base: LlamaForCausalLM, tokenizer: Any) -> None:
    rows = [row["messages"] for row in rows_of("heldout.jsonl")]
    got = script.answers(base, tokenizer, [messages[:-1] for messages in rows])
    assert share_right(got, [messages[-1]["content"] for messages in rows]) < 0.1
