"""What a run reads is fit for its model, and held-out rows are not among the trained ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.model.base import load_base
from qlora_cli.recipe.remote import whole, with_whole_paths
from qlora_cli.train.reading import keep_apart
from qlora_cli.train.run import Run
from qlora_cli.train.session import prepare
from tests.conftest import conversation


def row(number: int) -> str:
    return json.dumps(conversation(f"q{number}", f"a{number}")) + "\n"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "rows"
    place.mkdir()
    for at, name in enumerate(("train-0.jsonl", "heldout.jsonl", "train-test.jsonl")):
        (place / name).write_text("".join(row(10 * at + number) for number in range(6)))
    return place


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ({"path": "{}"}, {"path": "{}/heldout.jsonl"}),
        ({"path": "{}", "split": "train"}, {"path": "{}", "split": "test"}),
    ],
    ids=["a file of the folder", "a file of both splits"],
)
def test_held_out_files_among_the_trained_ones_are_refused(make_recipe, folder, tmp_path, train, held_out, streaming):
    train, held_out = ({**source, "path": source["path"].format(folder)} for source in (train, held_out))
    data = {"train": [{**train, "streaming": streaming}], "eval": [held_out]}
    with pytest.raises(UserError, match=r"(heldout|train-test)\.jsonl is held out and trained on"):
        prepare(make_recipe(data=data), Run(tmp_path), QuietReport(), "auto")


def test_a_stream_that_lets_longer_rows_through_than_the_model_reads(make_recipe, folder, tmp_path):
    data = {"train": [{"path": str(folder), "streaming": True}], "max_length": 4096}
    with pytest.raises(UserError, match=r"lets streamed rows of 4,096 tokens through, the model has 512 positions"):
        prepare(make_recipe(data=data), Run(tmp_path), QuietReport(), "auto")


@pytest.mark.parametrize("longest", [32, 33])
def test_a_rotary_embedding_that_follows_the_longest_row_is_packed_up_to_its_boundary(make_recipe, longest):
    """One document beyond it would turn the embedding of every other one beside it."""
    recipe = make_recipe(quantization={"data_type": "none"}, data={"packing": True})
    base = load_base(recipe, torch.device("cpu"))
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    base.config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    if longest == 32:
        assert keep_apart(recipe, base, QuietReport(), longest)
    else:
        with pytest.raises(UserError, match=r"cannot train packed rows: one example beyond the length"):
            keep_apart(recipe, base, QuietReport(), longest)


def test_an_attention_with_a_dense_mask_pads_where_packing_is_left_to_us(make_recipe, rows_file, tmp_path):
    told = []

    class Told(QuietReport):
        def say(self, text: str) -> None:
            told.append(text)

    session = prepare(make_recipe(model={"attn_implementation": "eager"}), Run(tmp_path), Told(), "auto")
    assert not session.packed
    assert any("attention eager would pay for a mask over all rows" in text for text in told)
    assert torch.is_grad_enabled()


def test_whole_paths_follow_links_as_the_system_does(make_recipe, tmp_path, monkeypatch):
    (tmp_path / "other/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "other/sub")
    (tmp_path / "other/rows.jsonl").write_text(row(1))
    monkeypatch.chdir(tmp_path)
    recipe = with_whole_paths(make_recipe(data={"train": [{"path": "link/../rows.jsonl"}]}))
    assert Path(recipe.data.train[0].path).read_text() == row(1)
    assert whole("./rows.jsonl") == str(tmp_path / "rows.jsonl")
