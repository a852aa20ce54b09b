"""What the documents show is what the program does."""

from __future__ import annotations

import ast
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


def defined_in(module: Path) -> set[str]:
    """Functions, classes and constants of a module, methods as Class.method."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=body):
                names |= {name, *(f"{name}.{one.name}" for one in body if isinstance(one, ast.FunctionDef))}
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def named_in(text: str) -> list[tuple[Path, str]]:
    """What a document names as `path::name`: tests from the repository on, code from the package on."""
    found = re.findall(r"`([\w/.-]+\.py)::([^`]+)`", text)
    return [
        ((REPOSITORY if path.startswith("tests/") else REPOSITORY / "qlora_cli") / path, name) for path, name in found
    ]


def not_there(text: str) -> list[str]:
    """Of what a document names, what does not exist."""
    return [f"{path}::{name}" for path, name in named_in(text) if not path.is_file() or name not in defined_in(path)]


def test_code_and_tests_that_the_documents_name_are_there():
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        assert not_there(document.read_text()) == [], document.name
    assert len(set(named_in((REPOSITORY / "docs" / "papers.md").read_text()))) > 60


@pytest.mark.parametrize(
    "wrong",
    [
        "tests/test_docs.py::test_no_such_test",
        "quant/scales.py::Scales.off",
        "quant/scale.py::absmax",
        "quant/svd.py::svd",
    ],
)
def test_a_name_that_is_wrong_is_found(wrong):
    right = "`tests/test_docs.py::defined_in`, `quant/scales.py::Scales.of`, `quant/codebooks.py::CODE_BOOKS`"
    assert not_there(right) == []
    assert len(not_there(f"{right}, `{wrong}`")) == 1


def test_errors_on_the_page_of_the_papers_are_measured_ones():
    """In the table of data types, which its script prints, or in the test of the known errors."""
    measured = (REPOSITORY / "docs" / "quantization.md").read_text()
    measured += (REPOSITORY / "tests" / "quant" / "test_blockwise.py").read_text()
    found = set(re.findall(r"\b0\.\d{4}\b", (REPOSITORY / "docs" / "papers.md").read_text()))
    assert len(found) > 10
    assert {figure for figure in found if figure not in measured} == set()


def test_the_page_on_evaluation_has_every_metric_and_every_suite():
    from qlora_cli.evaluate.metrics import METRICS
    from qlora_cli.evaluate.suites import SUITES

    page = (REPOSITORY / "docs" / "evaluation.md").read_text()
    kinds = {"text": "texts", "label": "classes", "value": "numbers"}
    for name, metric in METRICS.items():
        assert f"| `{name}` | {kinds[metric.kind]} | {metric.about} |" in page
    for name in SUITES:
        assert f"\n| `{name}` |" in page, f"the suite {name} is not told of"


def test_the_recipe_knows_every_metric():
    from qlora_cli.evaluate.metrics import METRICS
    from qlora_cli.recipe.suite_rules import METRICS_OF

    kinds = {"generate": "text", "classify": "label", "numbers": "value"}
    for suite, names in METRICS_OF.items():
        known = {name for name, metric in METRICS.items() if metric.kind == kinds[suite]}
        assert {*names} - {"regex"} == known, suite


def test_the_evaluations_of_the_page_are_valid_recipes(tmp_path):
    page = (REPOSITORY / "docs" / "evaluation.md").read_text()
    base = "model: {name_or_path: here/model}\ndata: {train: [{path: a.jsonl}], eval: [{path: b.jsonl}]}\n"
    suites, training = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    named = training.replace("evaluation:\n", "evaluation:\n  suites: [{suite: loss, name: quiz}]\n")
    for text in (suites, named):
        path = tmp_path / "my.yaml"
        path.write_text(base + text)
        assert load_recipe(path).evaluation.suites
