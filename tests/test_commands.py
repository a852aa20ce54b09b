"""train, eval and merge through the command line: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Ended, conversation
from tests.tiny import write_tiny_model


def values_of(tiny_model: Path, rows_file: Path, run: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {
            "train": [{"path": str(rows_file)}],
            "eval": [{"path": str(rows_file.with_name("heldout.jsonl"))}],
            "max_length": 256,
        },
        "training": {"max_steps": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
                     "logging_steps": 2, "eval_steps": 4, "save_steps": 4},
        "evaluation": {"max_new_tokens": 8},
        "output_dir": str(run),
    }  # fmt: skip


@pytest.fixture
def recipe_file(tiny_model, rows_file, tmp_path) -> Path:
    """A recipe for four steps on the tiny model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_of(tiny_model, rows_file, tmp_path / "run")))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, rows_file) -> Path:
    """A finished run, trained in a process of its own without a network where the machine allows that."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_of(tiny_model, rows_file, folder / "run")))
    done = subprocess.run([*offline(), sys.executable, "-m", "qlora_cli", "train", str(path)],
                          capture_output=True, text=True, env=online_environment())  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'run' / 'adapter'}\n"
    assert "Warning" not in done.stderr
    assert "kernels-community" not in done.stderr
    return folder / "run"


def offline() -> list[str]:
    """The prefix that runs a command in a network namespace without any network, or nothing where that is forbidden."""
    prefix = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    tried = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if tried else []


def online_environment() -> dict[str, str]:
    """The environment of a user, in which nothing keeps a library from the network."""
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}


# ── what they do ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_leaves_the_run_folder_of_the_design(finished):
    assert {path.name for path in finished.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "recipe.yaml", "resolved.yaml", "run.json", "run.lock",
    }  # fmt: skip
    facts = json.loads((finished / "run.json").read_text())
    assert set(facts["fingerprints"]) == {"base", "tokenizer", "chat_template", "data"}
    assert len(facts["base"]["quantized_modules"]) == 14
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert {"loss", "learning_rate", "grad_norm", "trained_tokens_per_s", "memory_bytes", "epoch"} <= set(lines[0])
    assert {"eval_loss", "eval_perplexity", "eval_token_accuracy"} <= set(lines[2])


def test_the_adapter_folder_loads_in_plain_peft(finished):
    import peft
    import torch
    from transformers import AutoTokenizer

    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(finished / "adapter"), dtype=torch.float32)
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(finished / "adapter").chat_template
    card = (finished / "adapter" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")


@pytest.mark.skipif(not offline(), reason="no network namespace may be made here")
def test_eval_and_merge_work_without_a_network(finished, tmp_path):
    for arguments in (["eval", finished, "--json"], ["merge", finished, "--out", tmp_path / "merged", "--json"]):
        done = subprocess.run(
            [*offline(), sys.executable, "-m", "qlora_cli", *map(str, arguments)], capture_output=True, text=True,
            env=online_environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)


def test_eval_shows_base_and_adapter_side_by_side(finished, qlora):
    ended = qlora("eval", finished, "--baseline")
    assert ended.code == 0
    for words in ("base", "adapter", "perplexity", "token_accuracy", "exact_match", "prompt", "expected"):
        assert words in ended.out
    assert "\x1b" not in ended.out + ended.err, "colour where there is no terminal"


def test_eval_json_is_one_object_with_the_figures(finished, qlora):
    result = json.loads(qlora("eval", finished, "--baseline", "--json").out)
    assert {suite["name"]: suite["rows"] for suite in result["suites"]} == {"loss": 4, "generate": 4}
    for model in ("base", "adapter"):
        figures = {"loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match"}
        assert set(result["models"][model]) == figures
    assert result["models"]["adapter"]["loss"] < result["models"]["base"]["loss"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert result["models"]["adapter"]["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)


def test_eval_limit_and_recipe_and_adapter(finished, recipe_file, qlora):
    result = json.loads(qlora("eval", recipe_file, "--adapter", finished / "adapter", "--limit", 2, "--json").out)
    assert [suite["rows"] for suite in result["suites"]] == [2, 2]
    assert list(result["models"]) == [finished.name], "another adapter than the run's is called by its run"


def test_eval_of_a_recipe_that_was_not_trained_measures_the_base(recipe_file, qlora):
    assert list(json.loads(qlora("eval", recipe_file, "--baseline", "--json").out)["models"]) == ["base"]
    ended = qlora("eval", recipe_file)
    assert (ended.code, ended.out) == (2, "")
    assert "no adapter there. Run `qlora train`, or measure the base alone with --baseline." in ended.err
    ended = qlora("eval", recipe_file, "--baseline", "--adapter", recipe_file.parent / "misspelt")
    assert (ended.code, ended.out) == (2, ""), "a named adapter that is not there was passed over"


def test_held_out_data_must_be_named(finished, qlora):
    ended = qlora("eval", finished, "--set", "data.eval=[]", "--set", "training.eval_steps=200")
    assert "data.eval: no held-out data" in ended.err


def test_eval_on_trained_rows_or_beyond_the_context_is_refused_before_a_weight_is_read(finished, tmp_path, qlora):
    """A model that has seen the rows cannot be measured on them, nor one on rows longer than it reads."""
    trained = yaml.safe_load((finished / "resolved.yaml").read_text())["data"]["train"][0]["path"]
    (tmp_path / "link.jsonl").symlink_to(trained)
    ended = qlora("eval", finished, "--set", f"data.eval=[{{path: '{tmp_path}/li*.jsonl'}}]")
    assert (ended.code, "is held out and trained on" in ended.err) == (2, True), ended.err
    path = write_rows(tmp_path / "rows.jsonl", conversation("hi", "ho" * 400))
    settings = ["--set", f"data.eval=[{{path: {path}}}]", "--set", "data.max_length=2048"]
    ended = qlora("eval", finished, *settings)
    assert (ended.code, "the model has 512 positions" in ended.err) == (2, True), ended.err
    assert "base  " not in ended.err, "the weights were read first"


@pytest.mark.parametrize(
    "settings",
    [["data.eval=[]", "training.eval_steps=200", "data.eval_fraction=0.5"],
     ["data.eval=[]", "training.eval_steps=200", "data.eval_fraction=0.5", "data.train=[{path: '%s/li*.jsonl'}]"]],
    ids=["rows held out only now", "of other files' names"],
)  # fmt: skip
def test_eval_of_another_split_than_the_run_held_out_is_refused(finished, tmp_path, qlora, settings):
    """The run trained on all rows: a part of them held out now is no held-out data."""
    trained = yaml.safe_load((finished / "resolved.yaml").read_text())["data"]["train"][0]["path"]
    (tmp_path / "link.jsonl").symlink_to(trained)
    options = [part for setting in settings for part in ("--set", setting.replace("%s", str(tmp_path)))]
    for adapter in ([], ["--adapter", finished / "adapter"]):
        ended = qlora("eval", finished, *options, *adapter)
        assert (ended.code, "is held out and trained on" in ended.err) == (2, True), ended.err


def test_eval_of_the_split_that_the_run_held_out_goes_on(recipe_file, tmp_path, qlora):
    values = yaml.safe_load(recipe_file.read_text())
    del values["data"]["eval"]
    values["data"]["eval_fraction"] = 0.4
    recipe_file.write_text(yaml.safe_dump(values))
    assert qlora("train", recipe_file, "--set", "training.max_steps=1").code == 0
    assert qlora("eval", tmp_path / "run").code == 0
    for setting in ("training.seed=8", "data.eval_fraction=0.9"):
        ended = qlora("eval", tmp_path / "run", "--set", setting)
        assert (ended.code, "is held out and trained on" in ended.err) == (2, True), ended.err


def test_eval_says_when_the_base_is_another(finished, qlora):
    ended = qlora("eval", finished, "--json", "--again", "--set", "quantization.data_type=fp4")
    assert ended.code == 0, ended.err
    assert "the base differs from the one trained on" in ended.err
    check_refused(qlora("eval", finished), "loss.adapter.jsonl: holds answers of another model", code=3)
    ended = qlora("eval", finished, "--json", "--again")
    assert ended.code == 0, ended.err
    assert "differs" not in ended.err


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_merge_writes_a_plain_transformers_folder_and_measures_it(finished, tmp_path, qlora, base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    whole = json.loads(qlora("merge", finished, "--out", out, "--base", base, "--json").out)
    assert whole["held"]
    (result,) = whole["merges"]
    assert json.loads((out / "merge.json").read_text()) == result
    assert result["same_base"] is True
    difference = result["certificate"]
    assert difference["positions"] > 100
    if base == "dequantized":
        assert difference["max_abs"] < 1e-4
        assert difference["top1_agreement"] == 1.0
    else:
        assert difference["max_abs"] > 1e-2, "the original weights are not those that were trained on"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_merged_folder_generates_the_unmerged_models_text(finished, tmp_path, qlora):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_cli.model.adapter import load_adapter
    from qlora_cli.model.base import load_base
    from qlora_cli.recipe import load_recipe

    assert qlora("merge", finished, "--out", tmp_path / "merged").code == 0
    base = load_base(load_recipe(finished / "resolved.yaml"), torch.device("cpu"))
    unmerged = load_adapter(base, finished / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for question in ("say 3", "say na na 9", "what else"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        settings = {"max_new_tokens": 24, "do_sample": False}
        assert torch.equal(unmerged.generate(input_ids=ids, **settings), merged.generate(input_ids=ids, **settings))


def test_a_damaged_adapter_is_neither_measured_nor_merged(finished, tmp_path, qlora):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for command in ("eval", "merge"):
        check_refused(qlora(command, run), "adapter: adapter_model.safetensors has changed since it was written")


def test_merge_refuses_to_overwrite(finished, tmp_path, qlora):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    ended = qlora("merge", finished, "--out", tmp_path / "mine")
    assert ended.code == 2
    assert "it exists and is not an empty folder; nothing is overwritten. Name a new folder with --out." in ended.err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_merge_of_no_run_says_so(tmp_path, recipe_file, qlora):
    assert "no run folder (no resolved.yaml)" in qlora("merge", tmp_path).err
    assert qlora("train", recipe_file, "--max-steps", 1).code == 0
    ended = qlora("merge", tmp_path / "run")
    assert (ended.code, ended.out) == (2, "")
    assert "no finished run there (no adapter/). Run `qlora train` to its end first." in ended.err


def test_max_steps_pauses_and_the_same_command_goes_on(recipe_file, tmp_path, qlora):
    ended = qlora("train", recipe_file, "--max-steps", 2, "--json")
    assert json.loads(ended.out) == {"adapter": str(tmp_path / "run" / "adapter"), "finished": False}
    ended = qlora("train", recipe_file)
    assert "step 2 of 4" in ended.err
    assert ended.out == f"{tmp_path / 'run' / 'adapter'}\n"
    ended = qlora("train", recipe_file, "--resume", "never")
    assert ended.code == 2
    assert "which --resume never would lose" in ended.err


def test_gradients_of_a_nan_stop_the_run_before_the_step(recipe_file, tmp_path, tiny_model, qlora):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ended = qlora("train", recipe_file, "--set", f"model.name_or_path={folder}")
    assert ended.code == 1
    assert "step 1: loss nan and gradient norm" in ended.err
    assert not (tmp_path / "run" / "adapter").exists()


# ── what they refuse: one message with place, cause and remedy, never a traceback ────────────────────────────────────


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_refused(ended: Ended, message: str, code: int = 2) -> None:
    assert ended.code == code, ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "recipe.yaml:1:"),
        (b"\x93NUMPY\x01\x00\xff\xfe", "not UTF-8"),
        (b"", "empty"),
        (b"model: {name_or_path: x}\ndata: {train: [{path: y}]}\nlearning_rat: 1\n", "recipe.yaml:3:1: unknown key"),
        (b"model: {name_or_path: x}\ndata: {train: [{path: y}]}\ntraining: {epochs: many}\n", "recipe.yaml:3:20"),
        (
            b"model: {name_or_path: x}\ndata: {train: [{path: y.csv}], eval: [{path: y.csv}]}\n",
            "held out here and trained on",
        ),
    ],
    ids=["not YAML", "binary junk", "empty", "unknown key", "wrong type", "impossible combination"],
)
def test_a_bad_recipe(tmp_path, qlora, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    check_refused(qlora("train", path), message)


def test_a_missing_recipe(tmp_path, qlora):
    check_refused(qlora("train", tmp_path / "nowhere.yaml"), "nowhere.yaml: no such file")


def test_a_missing_data_file(recipe_file, tmp_path, qlora):
    check_refused(qlora("train", recipe_file, "--set", f"data.train[0].path={tmp_path}/rows.jsonl"), "no such file")


def test_empty_data(recipe_file, tmp_path, qlora):
    path = write_rows(tmp_path / "rows.jsonl")
    check_refused(qlora("train", recipe_file, "--set", f"data.train[0].path={path}"), "rows.jsonl: ")


def test_a_missing_column(recipe_file, tmp_path, qlora):
    path = write_rows(tmp_path / "rows.jsonl", {"text": "a"}, {"txt": "b"})
    ended = qlora("train", recipe_file, "--set", f"data.train[0].path={path}")
    check_refused(ended, "rows.jsonl:2")
    assert "txt" in ended.err


def test_no_trained_token_in_any_row(recipe_file, tmp_path, qlora):
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "hello?"}]})
    ended = qlora("train", recipe_file, "--set", f"data.train[0].path={path}")
    check_refused(ended, "rows.jsonl:1")
    assert "assistant" in ended.err


def test_a_row_longer_than_the_limit(recipe_file, tmp_path, qlora):
    path = write_rows(tmp_path / "rows.jsonl", conversation("hi", "ho"), conversation("hi", "ho" * 400))
    ended = qlora("train", recipe_file, "--set", f"data.train[0].path={path}")
    check_refused(ended, "rows.jsonl:2: the row has")
    assert "data.max_length is 256" in ended.err


def test_a_row_beyond_the_models_positions(recipe_file, tmp_path, qlora):
    path = write_rows(tmp_path / "rows.jsonl", conversation("hi", "ho"), conversation("hi", "ho" * 400))
    settings = ["--set", f"data.train[0].path={path}", "--set", "data.max_length=2048"]
    check_refused(qlora("train", recipe_file, *settings), "tokens, the model has 512 positions (1 such row)")


def test_a_model_folder_without_weights(recipe_file, tmp_path, tiny_model, qlora):
    folder = shutil.copytree(tiny_model, tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    ended = qlora("train", recipe_file, "--set", f"model.name_or_path={folder}")
    check_refused(ended, f"{folder}: no *.safetensors weights in the model folder")


def test_a_tokenizer_larger_than_the_embedding(recipe_file, tmp_path, qlora):
    folder = write_tiny_model(tmp_path / "small", vocab_size=200, eos_token_id=2)
    ended = qlora("train", recipe_file, "--set", f"model.name_or_path={folder}")
    check_refused(ended, "the tokenizer's largest id is 258, the embedding has 200 rows")


def test_an_output_folder_that_cannot_be_written(recipe_file, tmp_path, qlora):
    (tmp_path / "file").write_text("")
    check_refused(qlora("train", recipe_file, "--set", f"output_dir={tmp_path}/file/run"), "cannot be written", code=1)


def without_rights() -> list[str]:
    """The prefix under which file permissions count for root too, as they do for any user."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("root may read and write everything, and setpriv cannot take that from it here")
    return prefix


@pytest.mark.parametrize(
    ("command", "option", "message", "code"),
    [
        ("train", "data.train[0].path={}/rows.jsonl", "rows.jsonl: cannot be read: Permission denied", 2),
        ("train", "model.name_or_path={}", "config.json: cannot be read: Permission denied", 2),
        ("train", "output_dir={}/run", "run: cannot be written: Permission denied", 1),
        ("eval", "{}/adapter", "adapter: Permission denied. Mend its permissions, or name another place.", 1),
    ],
    ids=["data", "model", "output", "adapter"],
)
def test_a_folder_without_permission(recipe_file, tmp_path, tiny_model, command, option, message, code):
    locked = shutil.copytree(tiny_model, tmp_path / "locked")
    settings = ["--set" if command == "train" else "--adapter", option.format(locked)]
    arguments = [*without_rights(), sys.executable, "-m", "qlora_cli", command, str(recipe_file), *settings]
    locked.chmod(0)
    try:
        ended = subprocess.run(arguments, capture_output=True, text=True)
    finally:
        locked.chmod(0o700)
    check_refused(Ended(ended.returncode, ended.stdout, ended.stderr), message, code)


def test_a_data_file_without_permission(recipe_file, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", conversation("hi", "ho"))
    path.chmod(0)
    arguments = [*without_rights(), sys.executable, "-m", "qlora_cli", "train", str(recipe_file)]
    ended = subprocess.run([*arguments, "--set", f"data.train[0].path={path}"], capture_output=True, text=True)
    check_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "rows.jsonl: cannot be read: Permission denied")


def test_an_output_folder_that_holds_another_run(finished, recipe_file, qlora):
    ended = qlora("train", recipe_file, "--set", f"output_dir={finished}", "--set", "training.seed=5")
    check_refused(ended, "holds another run: training.seed is 42 there, 5 here")


def test_a_tracker_that_is_not_installed(recipe_file, qlora):
    from accelerate.tracking import get_available_trackers

    if "mlflow" in map(str, get_available_trackers()):
        pytest.skip("mlflow is installed here")
    ended = qlora("train", recipe_file, "--set", "report_to=[mlflow]")
    check_refused(ended, "report_to: mlflow is not installed. Run `pip install 'qlora[track]'`.", code=4)
