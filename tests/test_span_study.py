"""The generated stories are as their script says, and the encoder that is pretrained on them loads as a base."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qlora_cli.data.squad import squad
from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that writes the stories."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import span_text  # type: ignore[import-not-found]

    return span_text


def rows_of(text: Any, new: bool, number: int = 300) -> list[dict[str, Any]]:
    random = Random(3)
    return [text.question_row(random, index, new) for index in range(number)]


@pytest.mark.parametrize("new", [False, True])
def test_every_row_is_one_of_squad_and_asks_about_one_fact(text: Any, new: bool) -> None:
    kinds: Counter[str] = Counter()
    for row in rows_of(text, new):
        question = squad(row, "here")  # raises where the answer does not stand there
        ((answer, _),) = question.answers
        sentences = [sentence for sentence in question.context.split(". ") if answer.lower() in sentence.lower()]
        asked = set(question.question.lower().strip("?").split()) - {"where", "who", "what", "did", "put", "the"}
        told = [sentence for sentence in sentences if asked <= set(sentence.lower().strip(".").split())]
        assert len(told) == 1
        kinds[question.id.split("-")[0]] += 1
    assert min(kinds[kind] for kind in text.ASKED) > 60


def test_finetuning_shows_no_person_thing_or_place_of_a_held_out_story(text: Any) -> None:
    sites = {site for each in text.SITES.values() for site in each}
    kinds = ({name.lower() for name in text.NAMES}, {*text.THINGS}, sites)
    found: dict[bool, list[set[str]]] = {}
    for new in (False, True):
        words = {word.strip(".").lower() for row in rows_of(text, new) for word in row["context"].split()}
        found[new] = [words & kind for kind in kinds]
    for shown, held_out, kind in zip(found[False], found[True], kinds, strict=True):
        assert min(len(shown), len(held_out)) >= len(kind) // 2 - 1
        assert not shown & held_out


def test_pretraining_shows_every_person_and_thing(text: Any) -> None:
    random = Random(4)
    shown = {word.strip(".?").lower() for _ in range(400) for part in text.document(random) for word in part.split()}
    assert {*(name.lower() for name in text.NAMES), *text.THINGS} <= shown


def test_the_stories_are_the_same_in_every_process(text: Any) -> None:
    code = (
        "import hashlib, json, random, span_text as t; r = random.Random(3);"
        "print(hashlib.sha256(json.dumps([t.question_row(r, i, i % 2 > 0) for i in range(50)]).encode()).hexdigest())"
    )
    random = Random(3)
    rows = [text.question_row(random, index, index % 2 > 0) for index in range(50)]
    ours = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    other = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(SCRIPTS)}
    theirs = subprocess.run([sys.executable, "-c", code], env=other, check=True, capture_output=True, text=True).stdout
    assert theirs.strip() == ours


def test_the_encoder_loads_as_a_base_and_its_tokenizer_knows_every_word(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from pretrain_encoder import masked_accuracy, new_model, new_tokenizer, pretrain  # type: ignore[import-not-found]

    from qlora_cli.model.base import load_base
    from qlora_cli.recipe import Recipe

    tokenizer = new_tokenizer()
    model = new_model(len(tokenizer))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    pretrain(model, tokenizer, 1)
    assert sum(not torch.equal(before[name], tensor) for name, tensor in model.named_parameters()) > 60
    assert 0 <= masked_accuracy(model, tokenizer, num_batches=1) < 0.3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = {
        "model": {"name_or_path": str(tmp_path), "task": "question_answering"},
        "data": {"train": [{"path": "rows.jsonl"}]},
    }
    base = load_base(Recipe.model_validate(recipe), torch.device("cpu"))
    assert "nf4" in base.summary
    for row in rows_of(text, True, 50):
        found = base.tokenizer(row["question"], row["context"])
        assert tokenizer.unk_token_id not in found["input_ids"]
        assert set(found["token_type_ids"]) == {0, 1}
        assert len(tokenizer.tokenize(row["question"])) == len(row["question"].split()) + 1
