"""What a model is fed in a conversation, and what it says."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.chat.dialogue import Dialogue
from qlora_cli.chat.pieces import Pieces
from qlora_cli.chat.session import Session
from qlora_cli.chat.wanted import Sampling
from qlora_cli.data.chat import chat_settings
from qlora_cli.data.examples import load_examples
from qlora_cli.data.prompts import Prompts
from qlora_cli.recipe.schema import Data
from tests.chat.conftest import said, session_of
from tests.tiny import tiny_tokenizer


def plainly(session: Session, model: Any, ids: list[int], number: int) -> str:
    """What plain transformers makes of the ids, greedily."""
    tokenizer = session.speakers[0].base.tokenizer
    input_ids = torch.tensor([ids])
    output = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=number, do_sample=False
    )[0, len(ids) :].tolist()
    kept = output[: output.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in output else output
    return tokenizer.decode(kept, skip_special_tokens=True)


def test_the_ids_before_every_answer_are_those_of_training(tmp_path):
    turns = [("hi", "hello ✓"), (" again \n", "yes"), ("日本", "no")]
    messages = [{"role": "system", "content": "short"}]
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer, data = tiny_tokenizer(), Data(train=[{"path": str(tmp_path / "rows.jsonl")}])
    stops, today = frozenset({tokenizer.eos_token_id}), date(2026, 1, 1)
    (row,) = load_examples(data, "train", tokenizer, stops, seed=0, today=today).rows
    begins = [at for at in range(1, row.num_tokens) if row.labels[at] >= 0 and row.labels[at - 1] < 0]
    with Prompts(chat_settings(data, tokenizer, stops, today)) as prompts:
        for turn, begin in enumerate(begins):
            assert prompts.of(messages[: 2 * turn + 2]).ids == list(row.input_ids[:begin])
    assert len(begins) == len(turns)


@pytest.mark.parametrize("who", ["adapter", "base", "merged"])
def test_replies_over_several_turns_are_those_of_plain_transformers_and_peft(run, tiny_model, who):
    import peft
    from transformers import BitsAndBytesConfig

    from qlora_cli.quant.bitsandbytes import disarm_cpu_repacking
    from qlora_cli.quant.linear4bit import work_round_cpu_dequantize

    if who == "merged":
        model: Any = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    else:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=four_bit, dtype=torch.float32)
        disarm_cpu_repacking(model)
        work_round_cpu_dequantize(model)
        model = model if who == "base" else peft.PeftModel.from_pretrained(model, str(run / "adapter"))
    model.eval()
    kept = []
    with session_of(run, Sampling(max_new_tokens=20), base=who == "base", merged=who == "merged") as session:
        dialogue = Dialogue(session, session.speakers[0])
        for text in ("say 1", "say na na 2", "and ✓?"):
            ids = session.prompts.of([*dialogue.messages, {"role": "user", "content": text}]).ids
            expected = plainly(session, model, ids, 20)
            assert said(dialogue, text).rstrip("\ufffd") == expected.rstrip("\ufffd")
            kept.append(dialogue.replies[-1].kept_tokens)
    assert kept[0] == 0
    assert kept[2] > kept[1] > 0, "what was read in the turn before is not read again"


def test_baseline_asks_base_and_adapter_and_each_keeps_its_own_conversation(run):
    def alone(**voices: Any) -> list[str]:
        with session_of(run, **voices) as session:
            dialogue = Dialogue(session, session.speakers[0])
            return [said(dialogue, text) for text in ("say 1", "say 2")]

    with session_of(run, baseline=True) as session:
        both = [Dialogue(session, speaker) for speaker in session.speakers]
        found = [[said(dialogue, text) for dialogue in both] for text in ("say 1", "say 2")]
        assert [speaker.name for speaker in session.speakers] == ["base", "adapter"]
    assert [list(column) for column in zip(*found, strict=True)] == [alone(base=True), alone()]
    assert alone() != alone(base=True)


def test_a_stop_token_ends_a_reply_and_is_not_said(run):
    with session_of(run, Sampling(max_new_tokens=30)) as session:
        dialogue = Dialogue(session, session.speakers[0])
        ids = session.prompts.of([{"role": "user", "content": "say 1"}]).ids
        dialogue.ask("say 1", lambda text: None)
        first = dialogue.replies[0]
        base = session.speakers[0].base
        third = base.tokenizer(first.text)["input_ids"][2]
        object.__setattr__(base, "stop_token_ids", frozenset({third}))
        dialogue.reset()
        reply = dialogue.ask("say 1", lambda text: None)
    assert (reply.stopped, reply.prompt_tokens) == ("stop token", len(ids))
    assert first.text.startswith(reply.text)
    assert reply.generated_tokens <= 2


def test_drawn_replies_are_repeated_by_their_seed_and_regenerated_otherwise(run):
    def drawn(seed: int) -> list[str]:
        with session_of(run, Sampling(20, 1.5, 0.9, seed)) as session:
            dialogue = Dialogue(session, session.speakers[0])
            return [said(dialogue, "say 1"), dialogue.again(lambda text: None).text]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    first, again = drawn(1)
    assert first != again


@pytest.mark.parametrize("text", ["日本語 🤗 déjà vu", "a\n b\n\n  c ", "🏳️‍🌈" * 5])
def test_pieces_are_whole_characters_and_together_the_text(text):
    tokenizer = tiny_tokenizer()  # a token per byte
    pieces = Pieces(tokenizer)
    given = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(given) + pieces.rest() == text
    assert not any("\ufffd" in piece for piece in given)
    assert max(map(len, given)) == 1


def test_pieces_of_sentencepiece_keep_their_spaces_and_line_breaks(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "stories260k-hf")
    for text in ("Once upon a time,\nthere was 日本 a cat.\n\n  She sat.", "you 🤗🤗 me"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = Pieces(tokenizer)
        assert "".join(map(pieces.add, ids)) + pieces.rest() == tokenizer.decode(ids)
        behind = Pieces(tokenizer, ids[:1])
        given = "".join(map(behind.add, ids[1:])) + behind.rest()
        assert tokenizer.decode(ids[:1]) + given == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_shown_as_one():
    pieces = Pieces(tiny_tokenizer())
    given = [pieces.add(token) for token in tiny_tokenizer()("a日")["input_ids"][:3]]
    assert [*given, pieces.rest()] == ["a", "", "", "\ufffd"]
