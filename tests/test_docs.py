"""What the documents show is what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from qlora_cli.errors import UserErrors
from qlora_cli.recipe import load_recipe
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
MISTAKEN = """\
model:
  name_or_path: meta-llama/Llama-3.1-8B
  load_in_4bit: true
adapter:
  r: 16
  lora_alpha: 32
data:
  train: [{path: train.jsonl, format: alpacca}]
training:
  learning_rate: 2e-4
  epochs: three
"""


def test_the_readmes_recipe_is_valid(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    assert load_recipe(path).output_dir == "runs/my"


def test_the_readmes_mistakes_give_the_messages_that_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(MISTAKEN)
    with pytest.raises(UserErrors) as error:
        load_recipe(Path("my.yaml"))
    assert f"$ qlora train my.yaml\n{error.value}\n```" in README


def test_the_readme_names_every_command():
    from qlora_cli.cli import app

    for name in get_command(app).commands:
        assert re.search(rf"`(qlora )?{name}\b", README), f"{name} is not in the README"


def test_every_link_of_the_documents_leads_to_a_file():
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_script_that_the_documents_name_is_there():
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for name in re.findall(r"\b(?:scripts|tests|configs)/[\w./-]+\.(?:sh|py|yaml)", document.read_text()):
            assert (REPOSITORY / name).exists(), f"{document.name}: {name}"
