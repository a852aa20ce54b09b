"""The folder that vLLM serves: its files, its command, and what its LoRA cannot do."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from folders import write_adapter

from qlora_cli.errors import UserError
from qlora_cli.export.source import Order, Source
from qlora_cli.export.vllm import CANNOT, write_vllm, write_vllm_lora
from tests.tiny import write_tiny_model

IN_THE_WAY = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
}


def order_of(out: Path, base_name: str | None = None) -> Order:
    return Order(out, "", base_name, lambda line: None)


def served(folder: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """Where serve.sh starts vllm, and with which arguments: another vllm, which prints them."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [folder / "serve.sh", "--port", "1"],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    where, *arguments = done.stdout.splitlines()
    return where, arguments


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    return write_adapter(tmp_path_factory.mktemp("served") / "mine", tiny_model)


def changed(adapter: Path, folder: Path, **changes: object) -> Source:
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Source(folder, "mine", base="me/base")


def test_the_model_is_served_from_its_own_folder(tiny_model, tmp_path):
    (tiny_model / "merge.json").write_text(json.dumps({"adapter": "/home/somebody"}))
    source = Source(tiny_model, "mine", template_kwargs={"enable_thinking": True}, inputs=(tiny_model,))
    facts = write_vllm(source, order_of(tmp_path / "out"))
    (tiny_model / "merge.json").unlink()
    where, arguments = served(tmp_path / "out", tmp_path)
    assert where == str(tmp_path / "out")
    told = ["--served-model-name", "mine", "--default-chat-template-kwargs", '{"enable_thinking": true}',
            "--max-model-len", "512"]  # fmt: skip
    assert arguments == ["serve", ".", *told, "--port", "1"]
    assert facts.commands[0].startswith(f"vllm serve {tmp_path / 'out'} --served-model-name mine")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "serve.sh"} <= names
    assert "merge.json" not in names


def test_weights_take_no_room_twice_and_load_in_plain_transformers(tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    write_vllm(Source(tiny_model, "mine"), order_of(tmp_path / "out"))
    one, other = (folder / "model.safetensors" for folder in (tiny_model, tmp_path / "out"))
    if one.stat().st_dev == other.stat().st_dev:
        assert one.samefile(other)
    ids = torch.tensor([[5, 6, 7]])
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny_model, tmp_path / "out")]
    assert torch.equal(*logits)


def test_classifiers_are_served_as_pooling_models_and_other_heads_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for head, options in (("SequenceClassification", "--runner pooling"), ("QuestionAnswering", None)):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [f"LlamaFor{head}"]}))
        if options:
            assert options in write_vllm(Source(folder, "mine"), order_of(tmp_path / head)).commands[0]
            continue
        with pytest.raises(UserError, match="vLLM does not serve question_answering"):
            write_vllm(Source(folder, "mine"), order_of(tmp_path / head))
        assert not (tmp_path / head).exists()


def test_an_adapter_is_served_on_its_base_with_a_rank_that_vllm_takes(adapter, tmp_path):
    facts = write_vllm_lora(Source(adapter, "mine", base="me/base"), order_of(tmp_path / "out"))
    where, arguments = served(tmp_path / "out", tmp_path)
    assert where == str(tmp_path / "out")
    template = ["--chat-template", "./chat_template.jinja"]
    told = ["--enable-lora", "--max-lora-rank", "8", *template, "--lora-modules", "mine=.", "--port", "1"]
    assert arguments == ["serve", "me/base", *told]
    assert facts.notes == []
    assert shlex.split(facts.commands[0])[-4:] == [
        *("--chat-template", str(tmp_path / "out" / "chat_template.jinja")),
        *("--lora-modules", f"mine={tmp_path / 'out'}"),
    ]
    facts = write_vllm_lora(Source(adapter, "mine", base="/models/base"), order_of(tmp_path / "other"))
    assert "the base is a folder of this machine, /models/base: --base-name HUB/ID" in facts.notes[0]
    facts = write_vllm_lora(Source(adapter, "mine", base="/models/base"), order_of(tmp_path / "third", "me/base"))
    assert facts.commands[0].startswith("vllm serve me/base --enable-lora")


def test_a_template_in_the_tokenizers_config_is_served_and_none_is_none(adapter, tmp_path):
    source = changed(adapter, tmp_path / "adapter")
    template = (source.folder / "chat_template.jinja").read_text()
    (source.folder / "chat_template.jinja").unlink()
    facts = write_vllm_lora(source, order_of(tmp_path / "without"))
    assert "--chat-template" not in facts.commands[0]
    config = source.folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    facts = write_vllm_lora(source, order_of(tmp_path / "with"))
    assert "--chat-template" in facts.commands[0]
    assert (tmp_path / "with" / "chat_template.jinja").read_text() == template


def test_a_base_that_is_named_from_here_is_found_from_there(adapter, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    facts = write_vllm_lora(Source(adapter, "mine", base=tiny_model.name), order_of(tmp_path / "out"))
    assert served(tmp_path / "out", tmp_path)[1][:2] == ["serve", str(tiny_model)]
    assert facts.commands[0].startswith(f"vllm serve {tiny_model} ")


@pytest.mark.parametrize("key", CANNOT)
def test_what_vllms_lora_cannot_do_is_said_with_its_reason_and_the_way_out(key, adapter, tmp_path):
    source = changed(adapter, tmp_path / "adapter", **{key: IN_THE_WAY[key]})
    with pytest.raises(UserError, match=f"{key}: the adapter has .*qlora merge"):
        write_vllm_lora(source, order_of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_adapters_than_lora_changed_bases_and_large_ranks_are_refused(adapter, tmp_path):
    for number, (changes, told) in enumerate([({"peft_type": "IA3"}, "this is IA3"), ({"r": 513}, "takes up to 512")]):
        with pytest.raises(UserError, match=told):
            write_vllm_lora(changed(adapter, tmp_path / str(number), **changes), order_of(tmp_path / "out"))
    source = changed(adapter, tmp_path / "started")
    (source.folder / "base.json").write_text("{}")
    with pytest.raises(UserError, match="its start changed the base"):
        write_vllm_lora(source, order_of(tmp_path / "out"))
