"""Every key of the recipe is alive: changing it changes something outside of the stored recipe, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from qlora_cli.data.formats import FORMATS, assistant, user
from qlora_cli.errors import UserErrors
from qlora_cli.recipe.fields import choices, dotted, fields, same, section_of, sections, today
from tests.live_keys.bench import Bench, Live
from tests.live_keys.data_keys import DATA
from tests.live_keys.model_keys import ADAPTER, MODEL, QUANTIZATION
from tests.live_keys.start_keys import START
from tests.live_keys.suite_keys import SUITES, write_suite_rows
from tests.live_keys.task_keys import TASK_ROWS, TASKS, lines_of
from tests.live_keys.training_keys import EVALUATION, TOP, TRAINING

LIVE = [*MODEL, *QUANTIZATION, *ADAPTER, *START, *DATA, *TASKS, *TRAINING, *EVALUATION, *SUITES, *TOP]

RULED = {
    "data.eval[0].weight": (2.0, {}),
    "evaluation.suites[0].data[0].weight": (2.0, {"evaluation.suites": [{"suite": "loss", "data": [{"path": "a"}]}]}),
}
"""Keys that a rule refuses for any value but their default: such a value, and what the recipe holds besides."""

NOT_YET: dict[str, list[Any]] = {
    "training.neftune_noise_alpha": [5],
}
"""Values whose feature is still to come, of keys that do not spell their values out."""


def keys() -> dict[str, FieldInfo]:
    """Every key of the schema that holds a value, by its dotted name."""
    return {
        dotted((*path, name)): field
        for path, section in sections()
        for name, field in fields(section).items()
        if section_of(field.annotation) is None
    }


def changeable(field: FieldInfo) -> bool:
    """Whether the key takes something besides its default and auto today."""
    allowed = today(field)
    if allowed is None:
        return True
    default = field.get_default(call_default_factory=True)
    return any(value != "auto" and not same(value, default) for value in allowed)


def spelled_out(field: FieldInfo) -> list[Any]:
    """The values of a Literal that are legal and not live."""
    allowed = today(field)
    return [value for value in choices(field.annotation) if allowed and not any(same(value, one) for one in allowed)]


def optional(some: dict[str, FieldInfo]) -> list[tuple[str, FieldInfo]]:
    """Those with a default."""
    return [(name, field) for name, field in some.items() if not field.is_required()]


SPELLED = {name: field for name, field in keys().items() if choices(field.annotation)}

USUAL = {
    (name, json.dumps(value))
    for name, value in [
        *((name, field.get_default(call_default_factory=True)) for name, field in optional(SPELLED)),
        *((name, "auto") for name in keys()),
        ("quantization.compute_dtype", "float32"),
        ("training.optimizer", "adamw"),
        ("data.packing", False),
    ]
}
"""Defaults, auto, and what the base recipe sets."""

REFUSED = [(name, value) for name, field in keys().items() for value in [*spelled_out(field), *NOT_YET.get(name, [])]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path, heldout_file: Path) -> Bench:
    """The tiny model and rows of all tests, and the other models and files that the tables name."""
    from tests.architectures import write_architecture
    from tests.tiny import write_tiny_model

    root = tmp_path_factory.mktemp("live")
    names = ("narrow", "own", "here", "there", "t5")
    places = {"model": tiny_model, "rows": rows_file, "heldout": heldout_file} | {name: root / name for name in names}
    write_tiny_model(places["narrow"], hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    write_own_model(places["own"])
    write_architecture(places["t5"], "t5")
    written = {f"format_{name}.jsonl": row_for(name) for name in FORMATS}
    written |= {"others.jsonl": rows_file.read_text(), "template.jinja": TEMPLATE, "moody.jinja": MOODY}
    written |= {f"{what}_{name}.jsonl": lines_of(name) for name in TASK_ROWS for what in ("task", "also")}
    written |= {"turns.jsonl": TURNS, "bad.jsonl": BAD, "columns.csv": "a,b\n007,eight\n"}
    for name, content in written.items():
        places[name.split(".")[0]] = root / name
        (root / name).write_text(content)
    places |= write_suite_rows(root)
    made = Bench(places, root)
    places["adapter"] = made.trained(made.recipe({"training.max_steps": 2})).folder / "adapter"
    return made


OWN_COLUMNS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "say", "output": "from alpaca"},
    "messages": {"messages": [user("say"), assistant("from messages")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "from sharegpt"}]},
    "prompt_completion": {"prompt": "say ", "completion": "from prompt_completion"},
    "input_output": {"input": "say ", "output": "from input_output"},
    "question_answer": {"question": "say", "answer": "from question_answer"},
    "summarisation": {"document": "say", "summary": "from summarisation"},
    "text": {"text": "from text"},
    "seed_tasks": {"instruction": "say", "instances": [{"input": "", "output": "from seed_tasks"}]},
    "hh_rlhf": {"chosen": "\n\nHuman: say\n\nAssistant: from hh_rlhf"},
    "oasst": {"text": "### Human: say### Assistant: from oasst"},
    "chip2": {"text": "<human>: say\n<bot>: from chip2"},
    "self_instruct": {"prompt": "say", "completion": " from self_instruct<|endoftext|>"},
    "longform": {"input": "say", "output": "from longform"},
}
"""The columns of each format."""

OTHERS = {"instruction": "do", "input": "that", "output": "done", "history": [["a", "b"]]}
"""Columns that alpaca reads more of than any other format does of its own."""


def row_for(name: str) -> str:
    """A row that `auto` does not read by the format: there are more columns of another one, or as many."""
    decoy = {"alpaca": OWN_COLUMNS["question_answer"], "oasst": OWN_COLUMNS["summarisation"]}.get(name, OTHERS)
    return json.dumps({**decoy, **OWN_COLUMNS[name]})


MOODY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ mood }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ mood }}\n{% endif %}"
)

TURNS = json.dumps({"messages": [user("a"), assistant("one"), user("b"), assistant("two")]})

BAD = "\n".join(json.dumps(row) for row in ({"text": "good"}, {"text": 5}, {"text": "fine"}))

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_own_model(folder: Path) -> None:
    """A model whose architecture only its own Python file knows."""
    from tests.tiny import write_tiny_model

    config = json.loads((write_tiny_model(folder) / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN)


@pytest.mark.parametrize("live", LIVE, ids=str)
def test_every_live_key_has_an_effect_outside_the_stored_recipe(bench: Bench, live: Live):
    without = live.see(bench, bench.recipe(live.beside))
    with_value = live.see(bench, bench.recipe({**live.beside, **live.along, live.key: live.value}))
    assert not live.expect(without, without), "the expectation would hold if the key were ignored"
    assert live.expect(without, with_value), f"{live}: {without} without it, {with_value} with it"


def test_every_key_is_in_the_table_or_takes_nothing_but_its_default():
    known = {live.key for live in LIVE} | set(RULED)
    expected = {name for name, field in keys().items() if changeable(field)}
    assert sorted(expected - known) == [], "a live key without an entry: add one to tests/live_keys"
    assert sorted(known - expected) == [], "an entry for a key that is gone, or takes nothing but its default"


def test_every_value_that_a_key_spells_out_is_in_the_table_or_refused():
    """Of keys with a list of values each live one has an entry; the base recipe's own is the other side of them all."""
    tried = {(live.key, json.dumps(live.value)) for live in LIVE}
    missing = [
        f"{name}={value}"
        for name, field in SPELLED.items()
        for value in choices(field.annotation)
        if (name, json.dumps(value)) not in tried | {(n, json.dumps(v)) for n, v in REFUSED} | USUAL
    ]
    assert missing == []


def test_every_key_with_values_to_come_is_tried_with_one():
    limited = {name for name, field in keys().items() if today(field) is not None and not spelled_out(field)}
    assert sorted(limited - set(NOT_YET)) == []
    assert sorted(set(NOT_YET) - set(keys())) == []


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_value_whose_feature_is_to_come_is_refused(tmp_path: Path, name: str, value: Any):
    with pytest.raises(UserErrors) as refused:
        Bench({}, tmp_path).recipe({name: value})
    told = [str(problem) for problem in refused.value.problems]
    assert len(told) == 1
    assert f"`{name}: " in told[0]
    assert "is not available yet" in told[0]


@pytest.mark.parametrize("name", RULED)
def test_a_key_without_effect_is_refused(tmp_path: Path, name: str):
    value, beside = RULED[name]
    assert Bench({}, tmp_path).recipe(beside)
    with pytest.raises(UserErrors, match="has no effect"):
        Bench({}, tmp_path).recipe({**beside, name: value})
