"""The tokenizer of a GGUF file: algorithm, cut, scores, stop tokens, BOS and template."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.prompts import Prompts
from qlora_cli.errors import UserError
from qlora_cli.export import gguf_pretokenizers as cuts
from qlora_cli.export import gguf_tokenizer
from qlora_cli.export.gguf_tokenizer import KEY, Kind, Trained, vocabulary_of
from tests.export.gguf_models import CHATML, QUICKSTART, byte_level, sentencepiece


def fields_of(tokenizer: Any, folder: Path) -> dict[str, Any]:
    tokenizer.save_pretrained(folder)
    return vocabulary_of(folder, len(tokenizer) + 8).fields


def edited(folder: Path, **model: Any) -> Path:
    """The quickstart's tokenizer with other keys in its model."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer_config.json", "config.json", "chat_template.jinja"):
        (folder / name).write_bytes((QUICKSTART / name).read_bytes())
    layout = json.loads((QUICKSTART / "tokenizer.json").read_text())
    layout["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    return folder


@pytest.mark.parametrize(
    ("regex", "ignore_merges", "name"),
    [
        (None, False, "gpt-2"),
        (cuts.QWEN2, False, "qwen2"),
        (cuts.LLAMA3, True, "llama-bpe"),
        (cuts.LLAMA3, False, "smaug-bpe"),
        (cuts.TEKKEN, True, "tekken"),
        (cuts.TEKKEN, False, "tekken"),  # its merges make every token, so both ways are one
        (cuts.GPT4O, False, "gpt-4o"),
    ],
)
def test_the_cut_is_read_from_the_tokenizer(regex: str | None, ignore_merges: bool, name: str, tmp_path: Path) -> None:
    assert fields_of(byte_level(regex, ignore_merges=ignore_merges), tmp_path)[KEY + "pre"] == name


def test_the_patterns_are_those_of_the_published_tokenizers() -> None:
    quickstart = json.loads((QUICKSTART / "tokenizer.json").read_text())  # cut as Qwen 2's
    assert quickstart["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == cuts.QWEN2
    assert cuts.LLAMA3 == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    assert cuts.TEKKEN == (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


def test_real_tokenizers_are_recognised(shared: Path) -> None:
    for folder, name in {"gpt2": "gpt-2", "smollm2-135m-instruct": "smollm"}.items():
        path = shared / "tokenizers" / folder / "tokenizer.json"
        assert cuts.name_of(json.loads(path.read_text()), path) == name


def test_an_unknown_cut_is_refused_and_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pre-tokenizer that cuts as this one does.*\\w\+.*llama-bpe"):
        fields_of(byte_level(r"\w+|\W+"), tmp_path)


def test_a_cut_whose_way_of_merging_is_unknown_is_refused_where_it_matters(tmp_path: Path) -> None:
    merges = json.loads((QUICKSTART / "tokenizer.json").read_text())["model"]["merges"]
    folder = edited(tmp_path, ignore_merges=True, merges=merges[:-1])  # the last token is reached as a whole alone
    with pytest.raises(UserError, match="no pre-tokenizer that cuts"):
        vocabulary_of(folder, 1024)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"dropout": 0.1}, "BPE with dropout"),
        ({"end_of_word_suffix": "</w>"}, "BPE with end_of_word_suffix"),
        ({"byte_fallback": True}, "a token for every byte, <0x00> is missing"),
    ],
)
def test_algorithms_that_llama_cpp_has_not_are_refused(model: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        vocabulary_of(edited(tmp_path, **model), 1024)


def test_a_word_piece_tokenizer_is_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((shared / "tokenizers/bert-uncased/tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot merge as this tokenizer does .WordPiece"):
        vocabulary_of(tmp_path, 30522)


def test_tokens_have_their_kinds_and_rows_without_a_token_a_name(tmp_path: Path) -> None:
    fields = fields_of(sentencepiece("legacy"), tmp_path)
    texts, kinds = fields[KEY + "tokens"], fields[KEY + "token_type"]
    assert len(texts) == len(kinds) == len(fields[KEY + "scores"])
    assert texts[-1] == f"[PAD{len(texts) - 1}]"
    assert kinds[-1] == Kind.UNUSED
    assert (kinds[texts.index("<s>")], kinds[texts.index("<0x0A>")]) == (Kind.CONTROL, Kind.BYTE)
    assert kinds[texts.index("a")] == Kind.NORMAL


def test_scores_follow_the_order_of_merges(tmp_path: Path) -> None:
    tokenizer = sentencepiece("legacy")
    fields = fields_of(tokenizer, tmp_path)
    scores = dict(zip(fields[KEY + "tokens"], fields[KEY + "scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert scores["".join(merges[0])] == 0.0
    assert scores["".join(merges[-1])] > -len(merges)
    assert scores["▁H"] > scores["▁Hello"] > scores["a"] == -1000.0


@pytest.mark.parametrize("spoil", ["drop", "apart"])
def test_merges_that_scores_cannot_express_are_refused(spoil: str, tmp_path: Path) -> None:
    sentencepiece("never").save_pretrained(tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = layout["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    at = next(index for index, text in enumerate(made) if made.count(text) > 1)
    moved = merges.pop(at)
    if spoil == "apart":
        merges.append(moved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match="its merges are not those of SentencePiece"):
        vocabulary_of(tmp_path, 500)


def test_the_space_before_a_text_follows_the_tokenizer(tmp_path: Path) -> None:
    for prefix, expected in {"legacy": True, "never": False, "first": False}.items():
        assert fields_of(sentencepiece(prefix), tmp_path / prefix)[KEY + "add_space_prefix"] is expected
    plain = sentencepiece("first")
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    vocabulary = vocabulary_of(tmp_path / "plain", 500)
    assert vocabulary.fields[KEY + "add_space_prefix"] is True
    assert "set for plain text" in vocabulary.notes[0]


def test_bos_is_added_where_training_had_it(tmp_path: Path) -> None:
    tokenizer = sentencepiece("legacy")
    assert tokenizer.chat_template == CHATML  # begins with bos_token
    assert fields_of(tokenizer, tmp_path / "writes")[KEY + "add_bos_token"] is True
    tokenizer.chat_template = CHATML.replace("{{ bos_token or '' }}", "")
    assert fields_of(tokenizer, tmp_path / "silent")[KEY + "add_bos_token"] is False
    tokenizer.chat_template = None  # and this tokenizer puts none before a text
    fields = fields_of(tokenizer, tmp_path / "plain")
    assert fields[KEY + "add_bos_token"] is False
    assert "tokenizer.chat_template" not in fields
    assert fields_of(byte_level(None), tmp_path / "none")[KEY + "add_bos_token"] is False


def test_stop_tokens_are_eos_eot_and_eom_and_a_fourth_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    assert fields_of(tokenizer, tmp_path)[KEY + "eot_token_id"] == tokenizer.eos_token_id
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1, 3, 4]}))
    vocabulary = vocabulary_of(tmp_path, len(tokenizer))
    assert [vocabulary.fields[f"{KEY}{end}_token_id"] for end in ("eos", "eot", "eom")] == [1, 2, 3]
    assert "<|assistant|> stop there only if known by name" in vocabulary.notes[-1]
    assert vocabulary.fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level(cuts.QWEN2, nfc=True)
    tokenizer.save_pretrained(tmp_path)
    assert "composes it (NFC)" in vocabulary_of(tmp_path, 1024).notes[0]
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    layout["added_tokens"][1]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    assert "does not strip spaces beside added tokens" in vocabulary_of(tmp_path, 1024).notes[-1]


def test_a_template_without_an_end_is_stopped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "Prompts", partial(Prompts, row_seconds=0.5))
    tokenizer = sentencepiece("legacy")
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"takes more than 0.5 s of processor time"):
        fields_of(tokenizer, tmp_path)
    assert time.monotonic() - began < 30


def test_bos_is_looked_for_with_the_arguments_of_the_run(tmp_path: Path) -> None:
    tokenizer = sentencepiece("legacy")
    tokenizer.chat_template = "{{ bos_token if begin else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert not fields_of(tokenizer, tmp_path)[KEY + "add_bos_token"]
    found = vocabulary_of(tmp_path, len(tokenizer) + 8, Trained({"begin": True}))
    assert found.fields[KEY + "add_bos_token"]
