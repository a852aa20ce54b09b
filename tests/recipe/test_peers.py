"""The table of other tools' names: it points to keys that exist, and their real configs meet it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.recipe import load_recipe
from qlora_cli.recipe.fields import describe, field_at, fields, section_of, sections, today, type_at
from qlora_cli.recipe.located_yaml import Located, parse_yaml, read_yaml
from qlora_cli.recipe.peers import PEERS, advice

CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "peer-configs"
OURS = {key for _, section in sections() for key in fields(section)}
SOURCE_KEYS = ("path", "name", "format", "limit")


@pytest.mark.parametrize("name", PEERS)
def test_every_place_in_the_table_is_in_the_schema(name: str):
    quoted = re.findall(r"`([a-z_0-9.]+)(?:: ([^`]+))?`", PEERS[name])
    for place, value in quoted:
        path = ("data", "train", 0, place) if place in SOURCE_KEYS else tuple(place.split("."))
        kind = type_at(path)
        assert kind is not None, place
        if value and not section_of(kind):
            parsed, _ = parse_yaml(value, Located("table"))
            assert isinstance(parsed, list | str), value
            assert str(parsed).strip("[']") in describe(kind) or "text" in describe(kind), (place, value)
    assert quoted or len(PEERS[name]) > 20


def test_no_name_in_the_table_is_a_key_of_ours_where_it_would_be_legal():
    for name in PEERS:
        *around, key = name.split(".")
        path = (*around, 0, key) if around else (key,)
        assert field_at(path) is None, name


@pytest.mark.parametrize(
    ("around", "name", "words"),
    [
        ((), "load_in_4bit", "Here it is `quantization.data_type: nf4`"),
        ((), "num_epochs", "Here it is `training.epochs`"),
        ((), "bf16", "Here it is `quantization.compute_dtype: bfloat16`"),
        (("adapter",), "lora_r", "Here it is `adapter.r`"),
        (("data", "train", 0), "type", "Here it is `format` of the source: alpaca, messages, ...; auto finds it"),
        (
            (),
            "deepspeed",
            "Leave it out: several processes are accelerate's, `accelerate launch -m qlora_cli train RECIPE`",
        ),
        ((), "type", ""),
        ((), "no_such_name", ""),
    ],
)
def test_a_peers_key_is_led_to_ours(around: tuple[str | int, ...], name: str, words: str):
    assert advice(around, name) == words


def test_a_place_whose_feature_is_still_to_come_says_so():
    field = field_at(("data", "eval_fraction"))
    assert field is not None
    later = len(today(field) or "more") == 1
    assert advice((), "val_set_size").endswith("not available yet") == later


@pytest.mark.skipif(not CONFIGS.exists(), reason="no ../shared/data/peer-configs beside the checkout")
@pytest.mark.parametrize("peer", ["axolotl", "llamafactory", "torchtune"])
def test_every_key_of_a_peers_configs_that_is_in_the_table_is_led_to_ours(peer: str):
    used = known = 0
    for path in sorted((CONFIGS / peer).rglob("*.y*ml")):
        values, located = read_yaml(path)
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        assert isinstance(caught.value, UserErrors), path
        said = {problem.where: problem for problem in caught.value.problems if problem.what.startswith("unknown key")}
        used += len(values)
        known += sum(key in PEERS or key in OURS for key in values)
        for key in [key for key in values if key in PEERS]:
            problem = said[str(located.keys[key,])]
            assert f"`{key}" in problem.what
            assert problem.todo == advice((), key)
    assert known >= 0.8 * used, f"{peer}: only {known} of {used} keys are known"
