"""The recipes of LoftQ's settings: the bits that their names say, the paper's numbers, headers that are true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from qlora_cli.data import classes, formats, pairs
from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.model.heads import Head, head_of
from qlora_cli.quant.data_types import CODES
from qlora_cli.quant.layers import packed_config
from qlora_cli.recipe import Recipe, load_recipe
from qlora_cli.recipe.schema import Source

CONFIGS = Path(__file__).parents[2] / "configs" / "loftq"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]

PAPER = {  # epochs, rows in a step, learning rate: tables 12 to 17 and appendices D.2, E.1 and F
    "mnli": (5, 32, 1e-4),
    "rte": (20, 32, 5e-4),
    "qnli": (10, 32, 5e-5),
    "mrpc": (60, 32, 1e-4),
    "qqp": (10, 32, 5e-5),
    "sst2": (10, 32, 5e-5),
    "cola": (60, 32, 5e-5),
    "stsb": (60, 32, 5e-5),
    "squad": (10, 16, 5e-5),
    "anli": (12, 32, 5e-5),
    "cnn-dailymail": (15, 64, 2e-4),
    "xsum": (25, 32, 2e-4),
    "wikitext2": (2, 32, 3e-4),
    "gsm8k": (6, 16, 3e-4),
}
NF2_RATES = {"rte": 5e-5, "stsb": 1e-4}  # table 13, where it is not table 12
NUMBERS = {"one": 1, "two": 2, "five": 5, "six": 6}


def rows_of_a_step(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.training.gradient_accumulation_steps


def all_sources(recipe: Recipe) -> list[Source]:
    return [*recipe.data.train, *recipe.data.eval, *(one for suite in recipe.evaluation.suites for one in suite.data)]


def data_of(path: Path) -> str:
    """mnli of deberta-v3-base-mnli.yaml."""
    return next(name for name in PAPER if f"-{name}" in path.stem)


SAID: dict[str, Callable[[Recipe], bool]] = {
    "rank 8": lambda recipe: recipe.adapter.r == recipe.adapter.alpha == 8,
    "rank 16": lambda recipe: recipe.adapter.r == recipe.adapter.alpha == 16,
    "2 bits": lambda recipe: recipe.quantization.data_type == "int2",
    "4 bits": lambda recipe: recipe.quantization.data_type == "nf4",
    "nf2": lambda recipe: recipe.quantization.data_type == "nf2",
    "uniform": lambda recipe: recipe.quantization.data_type == "int4",
    "16 rows": lambda recipe: rows_of_a_step(recipe) == 16,
    "script": lambda recipe: rows_of_a_step(recipe) == 64 and recipe.training.epochs == 3,
    "files": lambda recipe: {source.path for source in all_sources(recipe)} == {"xsum/default"},
}
"""What a variant in a header promises."""


def header(path: Path) -> list[str]:
    """The comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]


def variants(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The variants in a header: name, and the overrides behind its --set, over as many lines as they take."""
    named = ""
    found: dict[str, list[str]] = {}
    for line in header(path):
        named = match[1] if (match := re.match(r"#   (\S+(?: \S+)*)  +", line)) else named
        if "--set" in line:
            words = shlex.split(line[line.index("--set") :])
            for flag, value in zip(words[::2], words[1::2], strict=False):
                if flag != "--set":
                    break
                found.setdefault(named, []).append(value)
    yield from found.items()


VARIANTS = [(path, *variant) for path in RECIPES for variant in variants(path)]


def bits_by_layer(recipe: Recipe, names: list[str]) -> list[int]:
    config = packed_config(recipe.quantization)
    return [storage.code.bits for name in names if (storage := config.storage_of(name))]


@pytest.mark.parametrize("data", ["gsm8k", "wikitext2"])
@pytest.mark.parametrize("bits", [4, 3, 2.5, 2.25, 2])
def test_the_layers_of_llama_2_have_these_bits_on_average(bits, data):
    recipe = load_recipe(CONFIGS / f"llama2-7b-{data}-{bits}bit.yaml")
    names = [f"model.layers.{at}.{name}" for at in range(32) for name in PROJECTIONS]
    found = bits_by_layer(recipe, names)
    assert len(found) == len(names)
    assert sum(found) / len(found) == bits
    assert found == sorted(found, reverse=True), "the first layers have the more bits"
    assert packed_config(recipe.quantization).storage_of("lm_head") is None


def test_there_is_a_recipe_for_every_data_set_of_the_paper():
    assert {data_of(path) for path in RECIPES} == set(PAPER)
    assert len(RECIPES) == 12 + 2 * 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_what_the_recipe_does(path):
    recipe, text = load_recipe(path), "\n".join(header(path))
    assert text.startswith("# yaml-language-server: $schema=../../docs/recipe.schema.json\n")
    assert f"#   run        qlora train configs/loftq/{path.name}\n" in text
    assert f"#   then       qlora eval {recipe.output_dir}" in text
    assert recipe.output_dir == f"runs/{path.stem}"
    epochs, rows = re.search(r"(\w+) epochs of (\d+) rows", text).groups()  # type: ignore[union-attr]
    assert recipe.training.epochs == NUMBERS.get(epochs) or recipe.training.epochs == int(epochs)
    assert rows_of_a_step(recipe) == int(rows)
    assert f"rank {recipe.adapter.r}, " in text
    assert recipe.adapter.loftq.iterations == (1 if "one iteration" in text else 5)
    assert re.search(r"expected   not measured here; the paper", text)
    assert all(len(line) <= 120 for line in header(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_settings_are_the_papers(path):
    recipe = load_recipe(path)
    epochs, rows, rate = PAPER[data_of(path)]
    assert (recipe.training.epochs, recipe.training.learning_rate) == (epochs, rate)
    if data_of(path) == "gsm8k":  # the script's; the paper's is a variant
        assert rows_of_a_step(recipe) == 64
        recipe = load_recipe(path, dict(variants(path))["16 rows"])
    assert rows_of_a_step(recipe) == rows


@pytest.mark.parametrize(
    ("path", "name", "overrides"), VARIANTS, ids=[f"{one.stem}: {two}" for one, two, _ in VARIANTS]
)
def test_a_variant_of_a_header_is_valid_and_what_it_is_called(path, name, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xsum" / "default").mkdir(parents=True)  # downloaded: a split of a folder is known by its files
    before, recipe = load_recipe(path), load_recipe(path, overrides)
    assert SAID[name](recipe)
    assert not SAID[name](before), "it would change nothing"
    if name == "nf2":
        rate = before.training.learning_rate
        assert recipe.training.learning_rate == NF2_RATES.get(data_of(path), rate)


def test_every_recipe_but_those_of_unlike_bits_has_a_variant_at_another_rank():
    named = {path.stem for path, name, _ in VARIANTS if name.startswith("rank")}
    assert named == {path.stem for path in RECIPES if not path.stem.startswith("llama2")}
    four = {data_of(path) for path, name, _ in VARIANTS if name == "4 bits"}
    assert four == {"mnli", "qnli", "sst2", "anli"}, "those of the paper's table 11"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_metrics_are_known_and_the_best_is_one_of_a_suite_in_training(path):
    recipe = load_recipe(path)
    evaluation = recipe.evaluation
    names = {suite.name or suite.suite: suite for suite in evaluation.suites}
    assert {metric for suite in evaluation.suites for metric in suite.metrics} <= set(METRICS)
    assert set(evaluation.during_training) <= set(names)
    if evaluation.best_metric:
        suite, _, figure = evaluation.best_metric.partition(".")
        assert suite in evaluation.during_training
        assert figure in (names[suite].metrics or ["accuracy"])


ENCODERS = [path for path in RECIPES if path.stem.startswith("deberta")]


@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_all_of_deberta_is_at_two_bits_but_its_embedding_and_its_head(path):
    recipe = load_recipe(path)
    model, head = deberta(recipe.model.task)
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    inside = [name for name in linear if name not in head]
    assert len(inside) == 12 * 6
    assert set(linear) - set(inside) <= {"pooler.dense", "classifier", "qa_outputs"}
    spared = recipe.model_copy(update={"quantization": head.spared(recipe.quantization)})
    assert bits_by_layer(spared, inside) == [2] * len(inside)
    assert bits_by_layer(spared, [*head.modules]) == []
    assert CODES[recipe.quantization.embeddings](False, "auto").bits == 4


def deberta(task: str) -> tuple[object, Head]:
    """DeBERTa-v3-base for a task, without memory, and its head beside a checkpoint that has none."""
    import torch
    import transformers

    shape = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 128100, "type_vocab_size": 0}
    config = transformers.DebertaV2Config(**shape, relative_attention=True, pos_att_type=["p2c", "c2p"])
    config.share_att_key = True
    kinds = {"sequence_classification": "DebertaV2ForSequenceClassification"}
    with torch.device("meta"):
        model = getattr(transformers, kinds.get(task, "DebertaV2ForQuestionAnswering"))(config)
    stored = {name for name, _ in model.named_parameters() if name.startswith("deberta.")}
    return model, head_of(model, stored)


MEANT = {"True": "entailment", "Neither": "neutral", "False": "contradiction"}
ANSWERS: dict[str, dict[str, str]] = {  # what the harness's words stand for in a task's names of classes
    "mnli": MEANT,
    "anli": MEANT,
    "rte": {"True": "entailment", "False": "not_entailment"},
    "qnli": {"yes": "entailment", "no": "not_entailment"},
    "mrpc": {"yes": "equivalent", "no": "not_equivalent"},
    "qqp": {"yes": "duplicate", "no": "not_duplicate"},
    "cola": {"yes": "acceptable", "no": "unacceptable"},
    "sst2": {"positive": "positive", "negative": "negative"},
}


class Loader(yaml.SafeLoader):
    """YAML of lm-evaluation-harness, whose functions are left as their names."""


Loader.add_constructor("!function", lambda loader, node: str(node.value))


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra eval)")
@pytest.mark.parametrize("data", ANSWERS)
def test_sources_columns_and_the_order_of_labels_are_those_of_lm_evaluation_harness(data):
    tasks = Path(find_spec("lm_eval").origin).parent / "tasks"  # type: ignore[union-attr,arg-type]
    file = tasks / ("anli/anli_r1.yaml" if data == "anli" else f"glue/{data}/default.yaml")
    told = yaml.load(file.read_text(), Loader)
    recipe = load_recipe(CONFIGS / f"deberta-v3-base-{data}.yaml")
    train, held_out = recipe.data.train[0], recipe.data.eval[0]
    assert {(one.path, one.name) for one in all_sources(recipe)} == {(told["dataset_path"], told["dataset_name"])}
    assert (train.split, held_out.split) == (told["training_split"], told["validation_split"])
    assert recipe.model.labels == [ANSWERS[data][answer] for answer in told["doc_to_choice"]]
    columns = tuple(re.findall(r"\{\{(\w+)\}\}", told["doc_to_text"])) or ("premise", "hypothesis")
    row = {**dict.fromkeys(columns, "a text"), "label": 1, "idx": 0}
    assert columns in classes.TEXTS
    assert formats.choose_format(row, "here", classes.FORMATS) == "classification"


@pytest.mark.parametrize("columns", [("document", "summary", "id"), ("article", "highlights", "id")])
def test_rows_of_the_summaries_on_the_hub_are_read(columns):
    row = {column: column for column in columns}
    assert formats.choose_format(row, "here", pairs.FORMATS) == "summarisation"
    assert pairs.summarisation(row, "here") == pairs.Pair(*columns[:2])


def test_no_row_without_a_label_is_read():
    for path in ENCODERS:
        for source in all_sources(load_recipe(path)):
            hidden = source.path == "nyu-mll/glue" and (source.split or "").startswith("test")
            assert not hidden, f"{path.name}: the labels of GLUE's test rows are secret"
            assert source.split is not None
