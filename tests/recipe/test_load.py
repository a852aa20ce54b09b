"""Loading a recipe: all problems at once, each with its place, the value seen and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.recipe import Recipe, dump_recipe, load_recipe
from qlora_cli.recipe.dump import to_yaml
from qlora_cli.recipe.fields import fields, sections, today
from qlora_cli.recipe.load import check
from qlora_cli.recipe.located_yaml import Located, parse_yaml

ROOT = Path(__file__).parents[2]
MINIMAL = "model: {name_or_path: base}\ndata: {train: [{path: rows.jsonl}]}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


def complaints(path: Path, *overrides: str, text: str | None = None) -> str:
    """The message with the file's path left out of each line."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path}:", "")


def test_a_minimal_recipe_has_the_schema_defaults(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.adapter.alpha == 32.0
    assert recipe.data.train[0].path == "rows.jsonl"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.output_dir = "elsewhere"  # type: ignore[misc]


def test_all_problems_come_at_once_in_the_order_of_the_file(recipe_file: Path):
    text = """\
model:
  revision: ""
load_in_4bit: true
training: {epochs: three, learning_rate: -1, neftune_noise_alpha: 5}
adapter:
  r: 1.0
data:
  train:
    - {pathh: x}
"""
    assert complaints(recipe_file, text=text).splitlines() == [
        "1:1: `model.name_or_path` is missing. Add `name_or_path` to `model`: "
        "the base model: a hub id or a folder (text).",
        "2:13: `model.revision` is ''. Give text or null, not an empty one.",
        "3:1: unknown key `load_in_4bit: true`. Here it is `quantization.data_type: nf4`.",
        "4:20: `training.epochs` is 'three'. Give a number, above 0.",
        "4:42: `training.learning_rate` is -1. Give a number, above 0.",
        "4:67: `training.neftune_noise_alpha: 5` is not available yet. Leave it out: only null works today.",
        "6:6: `adapter.r` is 1.0. Give a whole number, at least 1.",
        "9:7: `data.train[0].path` is missing. Add `path` to `data.train[0]`: "
        "a file (json, jsonl, csv, tsv, txt, each also as gz or zst; parquet, arrow), a folder, a pattern or a hub id "
        "(text).",
        "9:8: unknown key `pathh: 'x'` in `data.train[0]`. The nearest key is `path`.",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r=true", "`adapter.r` is true. Give a whole number, at least 1."),
        ("adapter.alpha='16'", "`adapter.alpha` is '16'. Give a number, above 0, without quotes."),
        ("adapter.dropout=1", "`adapter.dropout` is 1. Give a number, at least 0, below 1."),
        ("adapter.use_dora=1", "`adapter.use_dora` is 1. Give true or false."),
        ("adapter.use_dora=yes", "`adapter.use_dora` is 'yes'. Write true: in YAML 1.2 yes is text."),
        ("adapter.use_dora='false'", "`adapter.use_dora` is 'false'. Write false, without quotes."),
        ("adapter.target_modules=[q_proj, 5]", "`adapter.target_modules[1]` is 5. Put it in quotes: '5'."),
        (
            "adapter.target_modules=[]",
            "`adapter.target_modules` is []. Give a list of texts or text, not an empty one.",
        ),
        ("adapter.target_modules={str: q}", "`adapter.target_modules` is {str: 'q'}. Give a list of texts or text."),
        ("adapter.layers=[0, -1]", "`adapter.layers[1]` is -1. Give a whole number, at least 0."),
        ("adapter.layers=[]", "`adapter.layers` is []. Give a list of whole numbers, at least 0, or null, not an"),
        ("adapter.rank_pattern={a: 0}", "`adapter.rank_pattern.a` is 0. Give a whole number, at least 1."),
        ("adapter.alpha_pattern={a: x}", "`adapter.alpha_pattern.a` is 'x'. Give a number, above 0."),
        ("adapter.from_=x", "unknown key `from_: 'x'` in `adapter`. The nearest key is `from`."),
        ("model.name_or_path=5", "`model.name_or_path` is 5. Put it in quotes: '5'."),
        ("model.revision=true", "`model.revision` is true. Put it in quotes: 'true'."),
        ("model.name_or_path=", "`model.name_or_path` is null. Give text."),
        ("model.name_or_path=''", "`model.name_or_path` is ''. Give text, not an empty one."),
        (
            "quantization.data_type=nf5",
            "`quantization.data_type` is 'nf5'. Perhaps nf4? Possible are nf4, fp4, int4, nf2, int2, int8",
        ),
        ("quantization.data_type=gguf", "`quantization.data_type` is 'gguf'. Give one of nf4, fp4, int4,"),
        ("report_to=[wandbb]", "`report_to[0]` is 'wandbb'. Perhaps wandb? Possible are tensorboard, wandb, trackio"),
        ("report_to=wandb", "`report_to` is 'wandb'. Give a list of tensorboard, wandb, trackio, mlflow."),
        ("data.packing=1", "`data.packing` is 1. Give auto or true or false."),
        ("data.train=[]", "`data.train` is []. Give a list of sections, not an empty one."),
        ("data.train=[x]", "`data.train[0]` is 'x'. Give a section with the keys path, name,"),
        ("evaluation=", "`evaluation` is null. Write its keys below it, indented, or leave it out: batch_size,"),
        ("evaluation.batch_size=0", "`evaluation.batch_size` is 0. Give auto or a whole number, at least 1."),
        ("training.max_steps=[1]", "`training.max_steps` is [1]. Give a whole number, at least 1, or null."),
        (
            "training.seed=4294967296",
            "`training.seed` is 4294967296. Give a whole number, at least 0, below 4294967296.",
        ),
        ("learning_rate=1", "unknown key `learning_rate: 1`. `learning_rate` belongs in `training`."),
        ("training.training=1", "unknown key `training: 1` in `training`. `training` belongs at the top level."),
        ("path=x", "`path` belongs in `data.train[0]` or in `data.eval[0]` or in `evaluation.suites[0].data[0]`."),
        (
            "training.Learning-Rate=1",
            "unknown key `Learning-Rate: 1` in `training`. The nearest key is `learning_rate`.",
        ),
        ("learnin_rate=1", "unknown key `learnin_rate: 1`. The nearest key is `training.learning_rate`."),
        ("adapter.zzz={a: 1}", "unknown key `zzz` in `adapter`. The keys here are r, alpha, dropout, target_modules,"),
    ],
)
def test_a_wrong_value_is_quoted_with_what_belongs_there(recipe_file: Path, override: str, words: str):
    text = complaints(recipe_file, override)
    assert text.startswith(f"--set {override}: "), text
    assert words in text
    assert "\n" not in text


def test_missing_sections_are_named_by_their_required_keys(recipe_file: Path):
    lines = complaints(recipe_file, text="output_dir: x\n").splitlines()
    assert [line.partition(". ")[0] for line in lines] == [
        "1:1: `data.train` is missing",
        "1:1: `model.name_or_path` is missing",
    ]


NOT_YET = [
    ((*path, name), value)
    for path, section in sections()
    for name, field in fields(section).items()
    if (allowed := today(field)) is not None
    for value in ["auto", None, True, False, 1, 2, 0.5, "x", "fp4", "int4", "skip", "last", ["x"], {"a": "b"}]
    if not any(type(value) is type(one) and value == one for one in allowed)
]


@pytest.mark.parametrize("path", sorted({path for path, _ in NOT_YET}, key=str))
def test_a_feature_that_is_not_there_yet_is_never_accepted(path: tuple[Any, ...]):
    for value in [value for where, value in NOT_YET if where == path]:
        values: dict[str, Any] = {"model": {"name_or_path": "b"}, "data": {"train": [{"path": "t"}]}}
        holder: Any = values
        for step in path[:-1]:
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
            if holder == {} and step == "eval":
                holder = values["data"]["eval"] = [{"path": "e"}]
        default = today(fields_of(path)[path[-1]])
        holder[path[-1]] = value
        recipe, problems = check(values)
        equal = any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in default or [])
        assert problems or equal, (path, value)
        del recipe


def fields_of(path: tuple[Any, ...]) -> dict[str, Any]:
    return next(fields(section) for where, section in sections() if where == path[:-1])


@pytest.mark.parametrize(
    "override",
    ["data.packing=auto", "data.packing=false", "data.train[0].weight=1", "data.eval_fraction=0", "model.num_labels="],
)
def test_the_default_and_auto_are_always_legal(recipe_file: Path, override: str):
    assert isinstance(load_recipe(recipe_file, [override]), Recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantization.compute_dtype=float16", "is not available yet. Use auto, bfloat16 or float32."),
        ("training.neftune_noise_alpha=5", "alpha: 5` is not available yet. Leave it out: only null works"),
    ],
)
def test_a_later_feature_names_what_works_today(recipe_file: Path, override: str, words: str):
    assert words in complaints(recipe_file, override)


def test_overrides_reach_every_key_and_the_last_one_wins(recipe_file: Path):
    overrides = [
        "training.learning_rate=1e-5",
        "training.learning_rate=1e-6",
        "adapter.target_modules=[q_proj, v_proj]",
        "adapter.rank_pattern={model.layers.0: 4}",
        "data.train.0.limit=3",
        "data.train[1].path=more.jsonl",
        "data.eval[0].path=a=b.jsonl",
        "adapter.from=",
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.training.learning_rate == 1e-6
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.adapter.rank_pattern == {"model.layers.0": 4}
    assert [(source.path, source.limit) for source in recipe.data.train] == [("rows.jsonl", 3), ("more.jsonl", None)]
    assert recipe.data.eval[0].path == "a=b.jsonl"


def test_an_override_replaces_a_wrong_value_and_its_place(recipe_file: Path):
    recipe_file.write_text(MINIMAL + "adapter: {target_modules: [1, 2]}\nevaluation:\n")
    replaced = ["adapter.target_modules=all-linear", "evaluation.max_new_tokens=3"]
    assert load_recipe(recipe_file, replaced).evaluation.max_new_tokens == 3
    assert complaints(recipe_file, "adapter={target_modules: [1]}", replaced[1]).startswith("--set adapter=")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r", "not of the form key=value. Write it like `--set training.learning_rate=1e-4`"),
        ("=3", "not of the form key=value"),
        ("adapter..r=3", "not of the form key=value"),
        ("model.name_or_path.x=3", "`model.name_or_path` is 'base', with no keys below it. Set the key itself."),
        ("data.train[2].path=x", "has 1 entries, so there is no [2]. The next free one is `data.train[1]`."),
        ("data.train.path=x", "`data.train` is a list, and `path` is no index. Write `data.train[0]`."),
        ("adapter.target_modules=[q", "a list or mapping in brackets that is not closed, in `[q`. Close the bracket"),
        ("adapter.r=!x 3", "the tag `!x`. Delete it"),
        ("adapter.r=.inf", ".inf is not a finite number"),
        ("adapter.rank_pattern={a: 1, a: 2}", "the key `a` appears twice"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(recipe_file: Path, override: str, words: str):
    text = complaints(recipe_file, override)
    assert text.startswith(f"--set {override}: "), text
    assert words in text


def test_every_unreadable_override_is_reported_and_a_long_one_cut(recipe_file: Path):
    lines = complaints(recipe_file, "a", "adapter.r=3", "b" * 200).splitlines()
    assert [line[:9] for line in lines] == ["--set a: ", "--set bbb"]
    assert len(lines[1]) < 250


@pytest.mark.parametrize(
    "text",
    ["no", "2e-4", "0o17", "1_000", "12:30:45", "~", "", "a: b", "# x", "- x", "<<", "\u2028", "\x85x", "a\x85", "é"],
)
def test_text_survives_the_dump(recipe_file: Path, text: str):
    assert parse_yaml(to_yaml({"key": text}), Located("dump"))[0] == {"key": text}


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0~"), min_size=1), min_size=1, max_size=3),
    number=st.floats(1e-300, 1e300),
)
def test_the_dump_reads_back_to_an_equal_recipe(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], number: float
):
    values = {
        "model": {"name_or_path": words[0]},
        "adapter": {"target_modules": words, "alpha": number, "from": None},
        "data": {"train": [{"path": f"{word}x"} for word in words]},
    }
    recipe, problems = check(values)
    assert recipe is not None
    assert not problems
    path = tmp_path_factory.mktemp("dump") / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


def test_the_dump_writes_every_key_in_schema_order(recipe_file: Path):
    written, _ = parse_yaml(dump_recipe(load_recipe(recipe_file)), Located("dump"))
    for path, section in sections():
        if path[:3] not in (("data", "eval", 0), ("evaluation", "suites", 0)) and path[-1:] != ("template",):
            holder = written
            for step in path:
                holder = holder[step]
            assert list(holder) == list(fields(section))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)


def test_problems_are_a_user_error_with_one_part_per_problem(recipe_file: Path):
    with pytest.raises(UserErrors) as caught:
        load_recipe(recipe_file, ["adapter.r=0", "adapter.alpha=0"])
    assert [problem.what for problem in caught.value.problems] == ["`adapter.r` is 0", "`adapter.alpha` is 0"]
