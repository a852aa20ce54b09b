"""`qlora preview`: what a user sees in a terminal, in a pipe, as JSON and as a page, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from qlora_cli.display import QuietReport
from qlora_cli.display_preview import print_preview
from qlora_cli.errors import UserError
from qlora_cli.plan.preview import bad_rows, preview
from tests.conftest import REPOSITORY, Ended, conversation

GOOD = conversation("Où est le chat ?", "Ici 😀")
SCRIPT = conversation("<script>alert(1)</script> \x1b[31mred", "<b>&amp;</b>")


@pytest.fixture
def recipe_file(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe whose training rows are given."""

    def write(rows: list[Any], **data: Any) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        values = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 256, "packing": False, **data}
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump({"model": {"name_or_path": str(tiny_model)}, "data": values}))
        return path

    return write


def json_of(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipe_gets_marks_and_no_escape_codes(qlora, recipe_file, tmp_path):
    ended = qlora("preview", recipe_file([GOOD, SCRIPT]))
    assert ended.code == 0, ended.err
    assert (
        f"1  {tmp_path}/rows.jsonl:1\n   46 tokens, 9 trained\n\n"
        "‹<|im_start|>›user\nOù est le chat ?‹<|im_end|>›\n‹<|im_start|>›assistant\n⟦Ici 😀‹<|im_end|>›⟧\n\n"
    ) in ended.out
    assert "<script>alert(1)</script> \\x1b[31mred" in ended.out
    assert "⟦trained⟧  not trained  ‹special token›" in ended.out
    assert "\x1b" not in ended.out + ended.err


def test_a_subprocess_that_writes_ascii_gets_marks_and_bars_of_ascii(recipe_file):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    command = [sys.executable, "-m", "qlora_cli", "preview", str(recipe_file([GOOD]))]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode("ascii")
    assert "{<|im_start|>}assistant\n[[Ici \\U0001f600{<|im_end|>}]]" in out
    assert "  ####" in out
    assert "\x1b" not in out


def test_a_terminal_gets_trained_text_bold_and_special_tokens_reversed(make_recipe):
    result = preview(make_recipe(), QuietReport(), "train", None, 1)
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=60)
    print_preview(result, console)
    out = console.file.getvalue()
    assert "\x1b[2;7m<|im_start|>\x1b[0m\x1b[2muser\x1b[0m" in out
    assert "\x1b[1;32m0\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m" in out
    assert "⟦" not in out


def test_row_n_is_shown_whole_with_its_place(qlora, recipe_file, tmp_path):
    long = conversation("word " * 40, "answer " * 3)
    path = recipe_file([GOOD, conversation("q" * 400, "a"), long], max_length=600)
    shown = qlora("preview", path).out
    assert "; shortened, --row 2 shows it whole\n" in shown
    assert "[... 165 characters ...]" in shown
    alone = qlora("preview", path, "--row", 2).out
    assert alone.startswith(f"2  {tmp_path}/rows.jsonl:2\n")
    assert "q" * 400 in alone
    assert "one epoch" not in alone
    assert [row["number"] for row in json_of(qlora("preview", path, "--row", 3, "--json"))["rows"]] == [3]


def test_a_row_beyond_the_end_is_refused(qlora, recipe_file):
    ended = qlora("preview", recipe_file([GOOD]), "--row", 2)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.endswith("--row 2: 1 example in all. Name a number from 1 to 1.\n")
    assert qlora("preview", recipe_file([GOOD]), "--row", 0).code == 2


def test_one_row_of_each_source_or_as_many_as_asked_for(qlora, recipe_file, rows_file, heldout_file):
    path = recipe_file([GOOD], train=[{"path": str(rows_file)}, {"path": str(heldout_file)}])
    assert [row["number"] for row in json_of(qlora("preview", path, "--json"))["rows"]] == [1, 13]
    assert [row["number"] for row in json_of(qlora("preview", path, "--json", "--limit", 3))["rows"]] == [1, 2, 13]
    assert json_of(qlora("preview", path, "--json", "--limit", 0))["rows"] == []


def test_json_holds_the_ids_and_the_numbers(qlora, recipe_file, tiny_model, rows_file):
    from transformers import AutoTokenizer

    result = json_of(qlora("preview", recipe_file([], train=[{"path": str(rows_file)}]), "--json"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    ids = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    assert [[token for piece in row["pieces"] for token in piece["ids"]] for row in result["rows"]] == ids[:3]
    trained = [len(row[1]["content"]) + 1 for row in rows]  # a token for each letter, and the end of the turn
    statistics = result["statistics"]
    assert statistics["num_tokens"] == sum(map(len, ids)) == result["sources"][0]["num_tokens"]
    assert statistics["num_trained"] == sum(trained) == statistics["epoch"]["num_trained"]
    assert statistics["lengths"]["most"] == max(map(len, ids))
    assert statistics["answers"]["most"] == max(trained)
    assert (statistics["epoch"]["steps"], statistics["epoch"]["total_steps"]) == (1, 3)


def test_held_out_rows_are_previewed_too(qlora, recipe_file, rows_file, heldout_file):
    path = recipe_file([GOOD], eval=[{"path": str(heldout_file)}])
    result = json_of(qlora("preview", path, "--role", "eval", "--json"))
    assert (result["role"], result["statistics"]["num_examples"], result["statistics"]["epoch"]) == ("eval", 4, None)
    ended = qlora("preview", recipe_file([GOOD]), "--role", "eval")
    assert ended.err == "data.eval: no held-out data. Name rows in data.eval, or set data.eval_fraction.\n"


def test_no_weight_is_read_and_nothing_is_written(qlora, recipe_file, tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    path = recipe_file([GOOD])
    before = sorted(tmp_path.iterdir())
    assert qlora("preview", path).code == 0
    assert sorted(tmp_path.iterdir()) == before


def test_rows_beyond_the_models_positions_are_told(make_recipe):
    rows = make_recipe().data.train[0].path
    long = Path(rows).with_name("long.jsonl")
    long.write_text(json.dumps(conversation("q" * 600, "a")) + "\n")
    recipe = make_recipe(data={"train": [{"path": str(long)}], "max_length": 1000})
    (note,) = preview(recipe, QuietReport(), "train", None, None)["notes"]
    assert note.endswith("tokens, the model 512 positions: training will refuse 1 example")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [60, 120])
def test_no_line_is_too_long_and_no_word_of_a_table_is_broken(make_recipe, rows_file, heldout_file, width):
    sources = [{"path": str(rows_file), "weight": 2.5}, {"path": str(heldout_file)}]
    recipe = make_recipe(data={"train": sources, "packing": True, "max_length": 256})
    result = preview(recipe, QuietReport(), "train", None, 0)
    console = Console(file=StringIO(), record=True, width=width, highlight=False)
    print_preview(result, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for wanted in ("rows", "examples", "tokens", "trained", "messages", "columns,", "2.5", "least", "median", "mean"):
        assert wanted in words
    for _, text in result["summary"]:
        assert set(text.split()) <= set(words)
    statistics = result["statistics"]
    assert {f"{statistics['lengths']['most']:,}", f"{statistics['answers']['mean']:,.1f}"} <= set(words)
    bins = [line for line in lines if "█" in line or "▏" in line]
    assert len(bins) >= sum(one["num_examples"] > 0 for one in statistics["histogram"])
    assert max(map(len, bins)) <= 60


def test_what_training_says_of_the_batches_is_what_the_preview_says(make_recipe):
    from qlora_cli.model.base import find_base
    from qlora_cli.train.feed import StoredFeed
    from qlora_cli.train.reading import load_role, order_of, say_layout

    class Told(QuietReport):
        def say(self, text: str) -> None:
            self.text = text

    for packing in (True, False):
        recipe = make_recipe(data={"packing": packing})
        result = preview(recipe, QuietReport(), "train", None, 0)
        examples = load_role(recipe, find_base(recipe), "train", QuietReport(), date.today())
        told = Told()
        say_layout(told, recipe, StoredFeed(examples, order_of(recipe, examples, 4)), packing)
        assert told.text == f"batches  {result['statistics']['epoch']['batches']}"


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD = [GOOD, {"messages": "none"}, GOOD, "not json", {"x": 1}]


def test_errors_lists_every_bad_row_and_ends_with_2(qlora, recipe_file, tmp_path):
    ended = qlora("preview", recipe_file(BAD), "--errors")
    assert ended.code == 2
    lines = ended.out.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{tmp_path}/rows.jsonl:{at}" for at in ("2", "4:1", "5")]
    assert lines[3:] == ["train: 3 of 5 rows bad"]


def test_errors_of_good_rows_ends_with_0(qlora, recipe_file):
    ended = qlora("preview", recipe_file([GOOD, GOOD]), "--errors")
    assert (ended.code, ended.out) == (0, "train: 0 of 2 rows bad\n")


def test_errors_as_json_is_one_object(qlora, recipe_file, tmp_path):
    ended = qlora("preview", recipe_file(BAD), "--errors", "--json")
    result = json.loads(ended.out)
    assert (ended.code, result["num_rows"], result["num_bad"], result["num_listed"]) == (2, 5, 3, 3)
    assert set(result["problems"][0]) == {"where", "what", "todo"}
    assert result["problems"][0]["where"] == f"{tmp_path}/rows.jsonl:2"


def test_errors_lists_the_rows_where_all_are_bad(qlora, recipe_file):
    ended = qlora("preview", recipe_file(["no", "no", "no"]), "--errors")
    assert ended.code == 2
    assert len(ended.out.splitlines()) == 4
    assert ended.out.endswith("train: 3 of 3 rows bad\n")


def test_errors_tells_of_long_rows_beside_the_bad_ones(qlora, recipe_file, tmp_path):
    rows = [GOOD, conversation("q" * 300, "a"), "no", conversation("q" * 400, "a")]
    ended = qlora("preview", recipe_file(rows), "--errors")
    bad, long, last = ended.out.splitlines()
    assert ended.code == 2
    assert bad.startswith(f"{tmp_path}/rows.jsonl:3:1: ")
    assert long.startswith(f"{tmp_path}/rows.jsonl:2: the row has ")
    assert "in all 2 of 4 rows are too long" in long
    assert last == "train: 1 of 4 rows bad"
    assert qlora("preview", recipe_file(rows[:2]), "--errors", "--set", "data.on_long_row=skip").code == 0


def test_at_most_a_thousand_bad_rows_are_listed_and_all_are_counted(recipe_file, qlora):
    ended = qlora("preview", recipe_file([GOOD, *["no"] * 1003]), "--errors")
    assert len(ended.out.splitlines()) == 1002
    assert ended.out.endswith("... and 3 more bad rows\ntrain: 1,003 of 1,004 rows bad\n")


def test_a_preview_of_bad_rows_is_the_error_of_training(qlora, recipe_file, tmp_path):
    ended = qlora("preview", recipe_file(BAD), "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["problems"][0]["where"] == f"{tmp_path}/rows.jsonl:2"


def test_errors_stands_alone(qlora, recipe_file):
    ended = qlora("preview", recipe_file([GOOD]), "--errors", "--row", 1)
    assert ended.err == "--errors: lists the bad rows alone. Leave --row, --html and --limit out.\n"
    assert ended.code == 2


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_help_shows_an_example_that_runs(qlora, recipe_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = qlora("preview", "--help").out
    assert "Example: qlora preview my.yaml\n" in page
    monkeypatch.chdir(recipe_file([GOOD]).parent)
    assert qlora("preview", "my.yaml").code == 0


def test_training_finds_what_the_preview_prepared_and_places_are_told_from_here(
    qlora, recipe_file, tmp_path, monkeypatch
):
    """The recipe names its file as seen from this folder; the run keeps whole paths, so that it can be moved from."""
    path = recipe_file([GOOD, GOOD])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    settings = ["--set", "data.train[0].path=rows.jsonl", "--set", "training.max_steps=1", "--set", "output_dir=run"]
    shown = json_of(qlora("preview", path, "--json", *settings))
    assert [row["where"] for row in shown["rows"]] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert shown["sources"][0]["path"] == "rows.jsonl"
    prepared = set(os.listdir(tmp_path / "cache" / "prepared"))
    assert qlora("train", path, *settings).code == 0
    assert set(os.listdir(tmp_path / "cache" / "prepared")) == prepared


def test_a_preview_of_a_hub_model_asks_for_no_weights(qlora, recipe_file, tiny_model, monkeypatch):
    """They may be gigabytes, and rows are looked at first."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert qlora("preview", recipe_file([GOOD]), "--set", "model.name_or_path=owner/model").code == 0
    assert "*.json" in asked
    assert not [pattern for pattern in asked if "safetensors" in pattern]


def test_of_a_stream_no_epoch_is_told(qlora, recipe_file, monkeypatch):
    """Nobody knows how long it is: its first rows are shown, and that training reads on."""
    monkeypatch.setattr("qlora_cli.train.reading.BLOCK", 3)
    path = recipe_file([conversation(f"q{number}", "a") for number in range(9)])
    settings = ["--set", "data.train[0].streaming=true", "--set", "training.max_steps=5"]
    result = json_of(qlora("preview", path, "--json", *settings))
    assert (result["statistics"]["num_examples"], result["statistics"]["epoch"]) == (3, None)
    assert result["notes"][0].endswith("rows of each source at most: it is streamed, and training reads on for 5 steps")
    assert "training reads on for 5 steps" in " ".join(qlora("preview", path, *settings).out.split())


def test_overrides_are_taken(qlora, recipe_file):
    result = json_of(qlora("preview", recipe_file([GOOD]), "--json", "--set", "training.max_steps=7"))
    assert result["statistics"]["epoch"]["total_steps"] == 7


def test_the_documents_show_what_the_program_prints(qlora, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COLUMNS", "76")
    printed = qlora("preview", "configs/quickstart.yaml", "--limit", 1).out
    lines = [line.rstrip() for line in printed.splitlines()]
    page, readme = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("docs/preview.md", "README.md"))
    assert "\n".join(lines) in page
    assert "\n".join(lines[:4]) in readme


# ── real data ────────────────────────────────────────────────────────────────────────────────────────────────────────

QUICKSTART = {"name_or_path": str(REPOSITORY / "configs/quickstart/base")}
REAL = {
    "gsm8k": ({"train": [{"path": "text/gsm8k/test.jsonl"}]}, 1319, "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs"),
    "oasst": (
        {"train": [{"path": "text/qlora/oa_questions.jsonl", "format": "oasst", "limit": 200}]},
        None,
        "Надеюсь, что я смог тебе помочь. Нужно ли тебе что-нибудь ещё? 😊",
    ),
    "alpaca": ({"train": [{"path": "text/llamafactory/alpaca_en_demo.json"}]}, None, "Making crepes is an easy"),
    "glaive": (
        {
            "train": [{"path": "text/llamafactory/glaive_toolcall_en_demo.json"}],
            "chat_template": "templates/axolotl/qwen_25.jinja",
        },
        None,
        "<tool_call>",
    ),
}


def real_recipe(make_recipe, shared: Path, data: dict[str, Any], base: dict[str, Any]) -> Any:
    sources = [{**source, "path": str(shared / source["path"])} for source in data["train"]]
    template = {"chat_template": str(shared / data["chat_template"])} if "chat_template" in data else {}
    limits = {"max_length": 65536, "on_bad_row": "skip", "on_long_row": "skip"}
    return make_recipe(model=base, data={**limits, "train": sources, **template})


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_shown_with_its_answers_trained(name, make_recipe, shared):
    data, number, answer = REAL[name]
    base = {} if "chat_template" in data else QUICKSTART  # whose end of a turn is that of the template
    recipe = real_recipe(make_recipe, shared, data, base)
    result = preview(recipe, QuietReport(), "train", None, 20)
    assert number in (None, result["statistics"]["num_examples"])
    trained = ["".join(piece["text"] for piece in row["pieces"] if piece["trained"]) for row in result["rows"]]
    assert any(answer in text for text in trained)
    assert "\ufffd" not in json.dumps(result, ensure_ascii=False)
    for row in result["rows"]:
        assert sum(len(piece["ids"]) for piece in row["pieces"]) == row["num_tokens"]
        assert sum(len(piece["ids"]) for piece in row["pieces"] if piece["trained"]) == row["num_trained"]
    print_preview(result, Console(file=StringIO(), width=60))
    assert bad_rows(recipe, QuietReport(), "train")["num_bad"] == result["statistics"]["num_bad"]


def test_a_template_in_the_recipe_shows_any_columns_without_code(make_recipe, shared):
    base = {"name_or_path": str(shared / "weights/tinystories-656k-hf")}
    template = {"prompt": "Data: {{ mr }}\nText:", "completion": " {{ ref }}"}
    data = {"train": [{"path": "text/e2e-nlg/devset.csv", "template": template}]}
    recipe = real_recipe(make_recipe, shared, data, base)
    result = preview(recipe, QuietReport(), "train", None, None)
    assert result["statistics"]["num_examples"] == 4672
    pieces = [(piece["text"], piece["trained"]) for piece in result["rows"][0]["pieces"]]
    assert pieces[1:] == [
        (" Data: nameAlimentum, areacity centre, familyFriendlyno\nText:", False),
        (" There is a place in the city centre, Alimentum, that is not family-friendly.", True),
        ("<|end_story|>", True),
    ]
    assert any("the tokenizer cannot write them: '[' in 4,672 rows" in note for note in result["notes"])


def test_a_missing_source_is_a_users_error(make_recipe):
    with pytest.raises(UserError, match="no such file"):
        bad_rows(make_recipe(data={"train": [{"path": "/none.jsonl"}]}), QuietReport(), "train")
