"""Data sets of ../shared train as they are, by a recipe alone; tests/test_preview.py looks at what is shown of them."""

from __future__ import annotations

import json

import pytest

from qlora_cli import commands
from qlora_cli.display import QuietReport
from tests.tiny import write_tiny_model

CONTEXT = 2**15
E2E = {"prompt": "Data: {{ mr }}\nText:", "completion": " {{ ref }}"}
REAL = {
    "gsm8k": ({"path": "text/gsm8k/train.jsonl"}, 7473),
    "oasst": ({"path": "text/qlora/oa_questions.jsonl", "format": "oasst"}, 953),
    "alpaca": ({"path": "text/llamafactory/alpaca_en_demo.json"}, 999),
    "tool calls": ({"path": "text/llamafactory/glaive_toolcall_en_demo.json"}, 300),
    "e2e-nlg": ({"path": "text/e2e-nlg/devset.csv", "template": E2E}, 4672),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_data_set_trains_by_a_recipe_alone(name, make_recipe, shared, tmp_path):
    """On a tiny model whose tokenizer spells letters, with a context for the longest row."""
    source, num_rows = REAL[name]
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=CONTEXT)
    template = {"chat_template": str(shared / "templates/axolotl/qwen_25.jinja")} if name == "tool calls" else {}
    path = str(shared / source["path"])
    recipe = make_recipe(
        model={"name_or_path": str(model)},
        data={"train": [{**source, "path": path}], "max_length": CONTEXT, **template},
        training={"max_steps": 2, "micro_batch_size": 1},
    )
    commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["loss"] < 20 for step in steps)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["rows"] == num_rows
