"""The table of exporters, and what all of them share."""

from __future__ import annotations

import json

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.export.source import context_of, hand_on, refuse_place, task_of
from qlora_cli.export.table import EXPORTERS, exporter_of
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_exporter_is_in_the_help_and_on_the_page(name, qlora):
    told = "".join(qlora("export", "--help").out.split())  # lines end at hyphens too
    assert f"{name}: {EXPORTERS[name].help}".replace(" ", "") in told
    assert f"`{name}`" in (REPOSITORY / "docs" / "export.md").read_text()


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_exporter_has_a_type_where_it_writes_a_gguf(name):
    gguf = pytest.importorskip("qlora_cli.export.gguf")
    exporter = exporter_of(name)
    assert not exporter.file_type or exporter.file_type in gguf.FILE_TYPES


def test_another_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no exporter 'GGUF'. Did you mean gguf\? choose from gguf, gguf-lora"):
        exporter_of("GGUF")
    with pytest.raises(UserError, match=r"no exporter 'onnx'. Choose from"):
        exporter_of("onnx")


def test_nothing_is_overwritten_and_nothing_is_put_into_what_is_exported(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    refuse_place(tmp_path / "new", [inside])
    refuse_place(inside, [])
    for out in (inside, inside / "deeper", tmp_path / "link" / "deeper"):
        if "link" in out.parts:
            (tmp_path / "link").symlink_to(inside)
        with pytest.raises(UserError, match="which is exported") as error:
            refuse_place(out, [inside])
        assert error.value.code == Exit.REFUSED
    (inside / "file").write_text("")
    for out in (inside, inside / "file", tmp_path / "link"):
        with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
            refuse_place(out, [])


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_for_the_disk_is_a_message(length, tmp_path):
    with pytest.raises(UserError, match="too long a name for this disk"):
        refuse_place(tmp_path / ("x" * length), [])


def test_paths_of_this_machine_in_small_files_are_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/base", "model_type": "llama"}))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "out").mkdir()
    notes = hand_on([tmp_path / "config.json", tmp_path / "other.json"], tmp_path / "out")
    assert notes == ["config.json: _name_or_path is a path of this machine: /home/me/base"]
    assert (tmp_path / "out" / "other.json").read_text() == "[1]"


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 256}, "max_position_embeddings": 1}, 256),
        ({}, None),
    ],
)
def test_the_context_is_read_from_the_config(config, context):
    assert context_of(config) == context


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "causal_lm"),
        ({"architectures": ["GPT2LMHeadModel"]}, "causal_lm"),
        ({}, "causal_lm"),
        ({"architectures": ["BertForQuestionAnswering"]}, "question_answering"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "sequence_classification"),
        ({"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "seq2seq_lm"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "causal_lm"),
    ],
)
def test_the_task_is_read_from_the_config(config, task):
    assert task_of(config) == task
