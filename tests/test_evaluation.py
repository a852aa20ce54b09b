"""`qlora eval` through the command line: suites of a recipe, files, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import conversation
from tests.tiny import write_tiny_model


def rows_of(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe_file(tiny_model, rows_file, heldout_file, tmp_path) -> Path:
    """A recipe with a suite of each kind that a decoder has."""
    choices = [{"query": f"Question: {n}?", "choices": ["yes", "no", "it is so"], "gold": n % 3} for n in range(6)]
    values = {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(rows_file)}], "eval": [{"path": str(heldout_file)}], "max_length": 128},
        "training": {
            "max_steps": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
            "optimizer": "adamw",
        },
        "evaluation": {
            "max_new_tokens": 4,
            "bootstrap_resamples": 50,
            "suites": [
                {"suite": "choice", "name": "quiz", "data": [{"path": rows_of(tmp_path / "quiz.jsonl", choices)}]},
                {"suite": "loss", "name": "prose", "data": [{"path": rows_of(tmp_path / "prose.jsonl", [
                    {"text": "once upon a time " * number} for number in range(1, 20)])}]},
                {"suite": "generate", "metrics": ["exact_match", "rougeL", "regex"], "pattern": "[0-9]+"},
                {"suite": "loss"},
            ],
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_recipes_suites_are_measured_side_by_side_with_every_answer_on_disk(recipe_file, qlora, tmp_path):
    assert qlora("train", recipe_file).code == 0
    assert qlora("merge", tmp_path / "run").code == 0
    ended = qlora("eval", tmp_path / "run", "--baseline", "--merged", tmp_path / "run" / "merged", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert {suite["name"]: suite["rows"] for suite in result["suites"]} == {
        "quiz": 6, "prose": len(lines_of(tmp_path / "run" / "eval" / "prose.base.jsonl")) - 1, "generate": 4, "loss": 4,
    }  # fmt: skip
    assert {"quiz.accuracy", "prose.bits_per_byte", "generate.regex", "loss.perplexity"} <= set(
        result["models"]["base"]
    )
    for suite in result["suites"]:
        stored = json.loads((tmp_path / "run" / "eval" / f"{suite['name']}.json").read_text())
        assert stored == suite
        assert list(stored["models"]) == ["base", "adapter", "merged"]
        for figures in stored["models"].values():
            assert all(found["low"] <= found["value"] <= found["high"] for found in figures.values())
        assert [(one["of"], one["to"]) for one in stored["differences"]] == [("adapter", "base"), ("merged", "adapter")]
        for name in stored["models"]:
            answers = lines_of(tmp_path / "run" / "eval" / f"{suite['name']}.{name}.jsonl")[1:]
            assert sorted(answer["row"] for answer in answers) == [*range(suite["rows"])]
            assert all("where" in answer for answer in answers)
    table = qlora("eval", tmp_path / "run", "--suite", "quiz", "--suite", "loss").out
    assert "quiz: 6 rows" in table
    assert "prose" not in table


def test_a_killed_evaluation_goes_on_where_it_was(recipe_file, tmp_path):
    rows = [conversation(f"say {'na ' * (number % 30)}{number}", f"{number}") for number in range(300)]
    held_out = rows_of(tmp_path / "many.jsonl", rows)
    command = [sys.executable, "-m", "qlora_cli", "eval", str(recipe_file), "--baseline", "--suite", "generate",
               "--json", "--set", f"data.eval=[{{path: {held_out}}}]", "--set", "evaluation.batch_size=1"]  # fmt: skip
    answers = tmp_path / "run" / "eval" / "generate.base.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not answers.exists() or answers.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = answers.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert 20 <= whole.count(b"\n") < 301
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers.read_bytes().startswith(whole), "what was answered is not asked again"
    assert sorted(line["row"] for line in lines_of(answers)[1:]) == [*range(300)]


def test_answers_of_another_model_are_refused_and_replaced_when_asked(recipe_file, qlora, tmp_path):
    assert qlora("eval", recipe_file, "--baseline", "--suite", "quiz").code == 0
    answers = tmp_path / "run" / "eval" / "quiz.base.jsonl"
    before = answers.read_bytes()
    other = ("--set", "quantization.data_type=int4")
    ended = qlora("eval", recipe_file, "--baseline", "--suite", "quiz", *other)
    assert (ended.code, answers.read_bytes()) == (3, before)
    assert f"{answers}: holds answers of another model. Give the suite another name, or measure anew" in ended.err
    assert qlora("eval", recipe_file, "--baseline", "--suite", "quiz", "--again", *other).code == 0
    assert answers.read_bytes() != before


def test_a_limit_has_files_of_its_own(recipe_file, qlora, tmp_path):
    assert qlora("eval", recipe_file, "--baseline", "--suite", "quiz").code == 0
    result = json.loads(qlora("eval", recipe_file, "--baseline", "--suite", "quiz", "--limit", 2, "--json").out)
    assert result["suites"][0]["rows"] == 2
    assert json.loads((tmp_path / "run" / "eval" / "quiz.json").read_text())["rows"] == 6
    assert result["suites"][0]["file"] == str(tmp_path / "run" / "eval" / "first-2" / "quiz.json")


def test_a_run_can_begin_beside_its_bases_evaluation(recipe_file, qlora):
    assert qlora("eval", recipe_file, "--baseline", "--suite", "quiz").code == 0
    assert qlora("train", recipe_file).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "quizz"], "--suite quizz: no such suite in the recipe. Choose from quiz, prose, generate, loss."),
        (["--merged", "nowhere"], "--merged nowhere: no merged model there."),
        (["--set", "evaluation.suites=[{suite: classify}]"], "`suite: classify` cannot measure `task: causal_lm`"),
        (["--set", "evaluation.suites=[{suite: choice}]"], "`suite: choice` without `data`"),
        (
            ["--set", "evaluation.suites=[{suite: generate, metrics: [accuracy]}]"],
            "'accuracy' is no metric of these answers. Choose from exact_match",
        ),
        (["--set", "data.eval=[]"], "data.eval: no held-out data."),
    ],
)
def test_what_cannot_be_measured_is_one_message(recipe_file, qlora, arguments, message):
    ended = qlora("eval", recipe_file, "--baseline", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_rows_that_were_trained_on_are_refused_in_a_suite_too(recipe_file, rows_file, qlora, tmp_path):
    """By whatever name, and whether a suite reads them as training does, as texts, or as columns of its own."""
    assert qlora("train", recipe_file).code == 0
    (tmp_path / "link.jsonl").symlink_to(rows_file)
    for suite in ("suite: loss", "suite: generate", "suite: choice"):
        ended = qlora("eval", recipe_file, "--set", f"evaluation.suites[0]={{{suite}, data: [{{path: {rows_file}}}]}}")
        assert (ended.code, "is held out here and trained on in `data.train[0]`" in ended.err) == (2, True), ended.err
        source = f"{{path: {tmp_path}/link.jsonl{', format: text' if suite == 'suite: loss' else ''}}}"
        ended = qlora("eval", recipe_file, "--set", f"evaluation.suites[0]={{{suite}, data: [{source}]}}")
        assert (ended.code, "trained on" in ended.err) == (2, True), ended.err
        assert "base  " not in ended.err, "the weights were read first"


# ── what answers depend on ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_model(tmp_path) -> Path:
    """A model that a test may change."""
    return write_tiny_model(tmp_path / "own")


@pytest.mark.parametrize(("file", "change"), [
    ("tokenizer.json", lambda text: text.replace('"add_prefix_space": false', '"add_prefix_space": true')),
    ("generation_config.json", lambda text: json.dumps(json.loads(text) | {"eos_token_id": [2, 100]})),
])  # fmt: skip
def test_answers_by_another_tokenizer_or_other_stop_tokens_are_not_taken_up(
    recipe_file, own_model, qlora, file, change
):
    arguments = ["eval", recipe_file, "--baseline", "--suite", "quiz", "--set", f"model.name_or_path={own_model}"]
    assert qlora(*arguments).code == 0
    before = (own_model / file).read_text()
    assert change(before) != before
    (own_model / file).write_text(change(before))
    ended = qlora(*arguments)
    assert ended.code == 3
    assert "holds answers of another model" in ended.err


def test_what_is_known_of_the_base_stands_beside_the_adapter(recipe_file, qlora, tmp_path):
    assert qlora("train", recipe_file).code == 0
    assert qlora("eval", tmp_path / "run", "--baseline", "--suite", "quiz").code == 0
    whole = (tmp_path / "run" / "eval" / "quiz.json").read_text()
    assert qlora("eval", tmp_path / "run", "--suite", "quiz").code == 0
    assert (tmp_path / "run" / "eval" / "quiz.json").read_text() == whole


@pytest.mark.parametrize("name", ["base", "start", "merged"])
def test_no_adapter_is_called_as_the_base_is(recipe_file, qlora, tmp_path, name):
    assert qlora("train", recipe_file).code == 0
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / name)
    ended = qlora("eval", recipe_file, "--adapter", tmp_path / name, "--suite", "quiz", "--json")
    assert list(json.loads(ended.out)["models"]) == [f"adapter-{name}"]


def test_a_folder_merged_from_another_adapter_or_with_another_tokenizer_is_refused(recipe_file, qlora, tmp_path):
    assert qlora("train", recipe_file).code == 0
    merged = tmp_path / "merged"
    assert qlora("merge", tmp_path / "run", "--out", merged).code == 0
    record = json.loads((merged / "merge.json").read_text())
    (merged / "merge.json").write_text(json.dumps(record | {"adapter_digest": "0" * 64}))
    ended = qlora("eval", tmp_path / "run", "--merged", merged, "--suite", "quiz")
    assert (ended.code, "was merged from another adapter" in ended.err) == (2, True), ended.err
    (merged / "merge.json").unlink()
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = qlora("eval", tmp_path / "run", "--merged", merged, "--suite", "quiz")
    assert (ended.code, "its tokenizer is another one" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize("suite", ["quiz", "prose", "generate", "loss"])
def test_a_model_whose_logits_are_no_numbers_is_told(recipe_file, own_model, qlora, suite):
    weights = load_file(own_model / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, own_model / "model.safetensors", {"format": "pt"})
    ended = qlora("eval", recipe_file, "--baseline", "--suite", suite, "--set", f"model.name_or_path={own_model}")
    assert (ended.code, ended.out) == (1, "")
    assert "the model's logits are not numbers. Check its weights" in ended.err


def test_what_a_metric_cannot_read_is_told_before_anything_is_asked(recipe_file, qlora, tmp_path):
    rows = [conversation("say", "no JSON"), conversation("write", "{}")]
    held_out = rows_of(tmp_path / "text.jsonl", rows)
    settings = [f"data.eval=[{{path: {held_out}}}]", "evaluation.suites=[{suite: generate, metrics: [json_equal]}]"]
    ended = qlora("eval", recipe_file, "--baseline", "--set", settings[0], "--set", settings[1])
    assert ended.code == 2, ended.err
    assert "JSON" in ended.err
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_nothing_of_a_row_reaches_the_terminal_as_a_command(recipe_file, qlora, tmp_path):
    rows = [conversation("say \x1b]0;owned\x07[bold]", "\x1b[2J"), conversation("say", "so")]
    held_out = rows_of(tmp_path / "odd.jsonl", rows)
    ended = qlora(
        "eval", recipe_file, "--baseline", "--suite", "generate", "--set", f"data.eval=[{{path: {held_out}}}]"
    )
    assert ended.code == 0
    assert "\x1b" not in ended.out
    assert r"\x1b]0;owned\x07[bold]" in ended.out


def test_rows_without_a_prompt_are_told(recipe_file, qlora, tmp_path):
    rows = [{"prompt": "", "completion": "text"}, {"prompt": "ask", "completion": "answer"}]
    held_out = rows_of(tmp_path / "mixed.jsonl", rows)
    ended = qlora(
        "eval", recipe_file, "--baseline", "--suite", "generate", "--set", f"data.eval=[{{path: {held_out}}}]"
    )
    assert ended.code == 0
    assert "generate: 1 row without a prompt not asked" in ended.err


def test_the_baseline_of_a_continued_adapter_is_that_adapter(recipe_file, qlora, tmp_path):
    assert qlora("train", recipe_file).code == 0
    values = yaml.safe_load(recipe_file.read_text())
    values |= {"adapter": {"from": str(tmp_path / "run" / "adapter")}, "output_dir": str(tmp_path / "on")}
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(values))
    assert qlora("train", tmp_path / "on.yaml").code == 0
    before = json.loads(qlora("eval", tmp_path / "run", "--suite", "loss", "--json").out)["models"]["adapter"]
    models = json.loads(qlora("eval", tmp_path / "on", "--baseline", "--suite", "loss", "--json").out)["models"]
    assert list(models) == ["start", "adapter"]
    assert models["start"] == before
    assert models["adapter"] != before
    again = json.loads(qlora("eval", tmp_path / "on", "--suite", "loss", "--json").out)["models"]
    assert again == models, "what is known stands beside it"


def test_a_suite_whose_file_is_not_there_is_told_before_training(recipe_file, qlora, tmp_path):
    (tmp_path / "quiz.jsonl").unlink()
    ended = qlora("train", recipe_file)
    assert ended.code == 2
    assert "quiz.jsonl" in ended.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_plain_text_has_a_loss_alone_unless_answers_are_asked_for(recipe_file, qlora, tmp_path):
    rows = rows_of(tmp_path / "plain.jsonl", [{"text": f"once upon a time {number}"} for number in range(4)])
    settings = ["--set", f"data.eval=[{{path: {rows}}}]", "--set", "evaluation.suites=[]", "--set",
                "evaluation.max_new_tokens=128"]  # fmt: skip
    result = json.loads(qlora("eval", recipe_file, "--baseline", "--json", *settings).out)
    assert [suite["name"] for suite in result["suites"]] == ["loss"]
    ended = qlora("eval", recipe_file, "--baseline", "--suite", "generate", *settings)
    assert ended.code == 2
    assert "its rows are plain text: nothing is asked" in ended.err
