"""The adapter for others: whole, verified, loadable, without the paths of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import write_adapter

from qlora_cli.errors import UserError
from qlora_cli.export.peft_folder import check_base_name, is_hub_id, write_peft
from qlora_cli.export.source import Order, Source, places_in, without_places
from qlora_cli.model.whole_folder import fault, publish


@pytest.fixture
def adapter(tmp_path, tiny_model) -> Path:
    """An adapter folder with a manifest, as a run's is."""
    made = write_adapter(tmp_path / "made", tiny_model)
    return publish(
        tmp_path / "mine",
        lambda place: [(place / file.name).write_bytes(file.read_bytes()) for file in made.iterdir()],
    )


def order_of(out: Path, base_name: str | None = None) -> Order:
    return Order(out, "", base_name, lambda line: None)


def test_the_folder_is_the_adapter_signed_anew_and_loads_in_plain_peft(adapter, tiny_model, tmp_path):
    import peft

    facts = write_peft(Source(adapter, "mine", base=str(tiny_model)), order_of(tmp_path / "out"))
    assert fault(tmp_path / "out") == ""
    assert any(f"folder of this machine, {tiny_model}" in note for note in facts.notes)
    models = [peft.AutoPeftModelForCausalLM.from_pretrained(str(folder)) for folder in (adapter, tmp_path / "out")]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(*(model(ids).logits for model in models))


def test_the_base_gets_another_name_in_the_config_and_on_the_card(adapter, tiny_model, tmp_path):
    source = Source(adapter, "mine", base=str(tiny_model), places=("/home/somebody/rows.jsonl",))
    facts = write_peft(source, order_of(tmp_path / "out", "01-me/base"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "01-me/base"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: 01-me/base\n")
    assert "# A LoRA adapter for 01-me/base" in card
    assert "Trained on rows.jsonl, see https://example.org/a/b." in card
    assert facts.notes == []
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert before == config | {"base_model_name_or_path": str(tiny_model)}


def test_a_card_without_a_name_for_the_base_names_none(adapter, tiny_model, tmp_path):
    write_peft(Source(adapter, "mine", base=str(tiny_model)), order_of(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card
    assert str(tiny_model.parent) not in card


def test_nothing_but_the_adapter_is_handed_on(adapter, tmp_path):
    (adapter / "optimizer.safetensors").write_bytes(b"")
    (adapter / "recipe.yaml").write_text("secret")
    write_peft(Source(adapter, "mine", base="me/base"), order_of(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"optimizer.safetensors", "recipe.yaml"})
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"} <= names


def test_a_damaged_adapter_is_refused_and_leaves_nothing(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors has changed since it was written"):
        write_peft(Source(adapter, "mine", base="me/base"), order_of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_changed_base_is_told(adapter, tmp_path):
    (adapter / "base.json").write_text(json.dumps({"content": "0" * 64}))
    facts = write_peft(Source(adapter, "mine", base="/models/base"), order_of(tmp_path / "out"))
    assert "its start changed the base: it works on /models/base and no other" in facts.notes[-1]
    assert (tmp_path / "out" / "base.json").exists()


def test_an_adapter_without_weights_or_base_is_refused(adapter, tmp_path):
    with pytest.raises(UserError, match="names no base model"):
        write_peft(Source(adapter, "mine"), order_of(tmp_path / "out"))
    (adapter / "manifest.json").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors there"):
        write_peft(Source(adapter, "mine", base="me/base"), order_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("on /data/a b/rows.jsonl, and", "on rows.jsonl, and"),
        ("(`/runs/x`)", "(`x`)"),
        ("file:///runs/x/adapter data:/runs/x.", "file://x/adapter data:x."),
        ("/runs/xy and /runs/x.txt and /runs/x", "/runs/xy and /runs/x.txt and x"),
        ("https://hub.co/runs/x", "https://hub.co/runs/x"),
        ("/v1/chat/completions, 1 / 2 and /usr", "/v1/chat/completions, 1 / 2 and /usr"),
        ("/home/John Smith/notes", "~/notes"),
        ("see /.", "see /."),
    ],
)
def test_known_paths_leave_a_card_and_nothing_else_does(text, left, monkeypatch):
    monkeypatch.setenv("HOME", "/home/John Smith")
    assert without_places(text, ["/runs/x", "/data/a b/rows.jsonl", "/"]) == left


def test_every_path_of_a_value_is_found():
    assert places_in({"a": "/x/y", "b": [{"c": "/z"}, "me/base", 3], "d": None}) == ["/x/y", "/z"]


def test_a_card_that_is_no_utf_8_is_handed_on_byte_by_byte(adapter, tmp_path):
    card = "---\nbase_model: x/y\n---\n\nCaf\xe9\n".encode("latin-1")
    (adapter / "README.md").write_bytes(card)
    write_peft(Source(adapter, "mine", base="x/y"), order_of(tmp_path / "out", "me/base"))
    assert (tmp_path / "out" / "README.md").read_bytes() == card.replace(b"x/y", b"me/base")


def test_a_card_is_not_a_template_of_replacements(adapter, tmp_path):
    base = tmp_path / "a\\1g"
    base.mkdir()
    (adapter / "README.md").write_text("---\nbase_model: x/y\n---\n\n# A LoRA adapter for x/y\n")
    write_peft(Source(adapter, "mine", base="x/y"), order_of(tmp_path / "out", str(base)))
    assert (tmp_path / "out" / "README.md").read_text() == f"---\n---\n\n# A LoRA adapter for {base}\n"


def test_the_name_of_a_base_is_a_hub_id_or_a_folder(tmp_path):
    check_base_name("me/base")
    check_base_name(str(tmp_path))
    for name in ("me/x\nlicense: evil", "me/x\n", "", "a b", "me/x/y", str(tmp_path / "absent"), "mé/x"):
        with pytest.raises(UserError, match="no hub id and no folder"):
            check_base_name(name)


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("me/base")
    assert is_hub_id("gpt2")
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_id("gpt2")
    assert not is_hub_id("/me/base")
    assert not is_hub_id("../base")
