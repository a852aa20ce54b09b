"""`qlora export` through the command line: which folder is taken, what is trusted, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.evaluation import digest_of
from tests.conftest import Ended

TEMPLATE_KWARGS = {"mood": "good"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, rows_file) -> Path:
    """A finished run of two steps, with what stands for its merged model: export looks at no weight's value."""
    folder = tmp_path_factory.mktemp("exported")
    values = {
        "model": {"name_or_path": str(tiny_model)},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(rows_file)}], "max_length": 256, "chat_template_kwargs": TEMPLATE_KWARGS},
        "training": {"max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        "output_dir": str(folder / "My run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "qlora_cli", "train", str(folder / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged = Path(shutil.copytree(tiny_model, folder / "My run" / "merged"))
    (merged / "merge.json").write_text(json.dumps({"adapter_digest": digest_of(folder / "My run" / "adapter")}))
    return folder / "My run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "My run"))


def certify(run: Path, certificate: Any, **changes: Any) -> None:
    path = run / "merged" / "merge.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"certificate": certificate} | changes))


def refused(ended: Ended, code: int, told: str) -> None:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert told in ended.err
    assert ended.err.count("\n") == 1


# ── what it takes ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_exported_into_its_own_folder_under_its_name(run, qlora):
    certify(run, {"held": True})
    ended = qlora("export", run, "--to", "vllm", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["out"] == str(run / "export" / "vllm")
    assert result["from"] == str(run / "merged")
    assert result["notes"] == []
    assert result["files"] == {path.name: path.stat().st_size for path in (run / "export" / "vllm").iterdir()}
    (command,) = result["commands"]
    assert "--served-model-name my-run" in command
    assert json.dumps(TEMPLATE_KWARGS) in command, "the recipe's chat_template_kwargs are part of the template"
    refused(qlora("export", run, "--to", "vllm"), 2, "is there already, and nothing is overwritten")


def test_the_adapter_needs_no_merged_model(run, qlora):
    shutil.rmtree(run / "merged")
    ended = qlora("export", run, "--to", "peft")
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"{run / 'export' / 'peft'}  (peft: ")
    assert (run / "export" / "peft" / "adapter_model.safetensors").exists()
    ended = qlora("export", run, "--to", "vllm-lora", "--base-name", "me/base")
    assert "the adapter was trained on the base in nf4" in ended.out
    refused(qlora("export", run, "--to", "vllm"), 2, f"no merged model there. Run `qlora merge {run}` first.")


def test_the_gguf_is_a_file_and_ollama_gets_the_runs_template(run, qlora):
    pytest.importorskip("gguf")
    certify(run, {"held": True})
    ended = qlora("export", run, "--to", "gguf", "--type", "F16", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["out"] == str(run / "export" / "gguf" / "model-f16.gguf")
    assert Path(result["out"]).read_bytes().startswith(b"GGUF")
    assert any('the server has to be told {"mood": "good"}' in note for note in result["notes"])
    arguments = ["--jinja", "--chat-template-kwargs", json.dumps(TEMPLATE_KWARGS)]
    assert list(map(shlex.split, result["commands"])) == [["llama-server", "-m", result["out"], *arguments]]
    ended = qlora("export", run, "--to", "gguf-lora")
    assert ended.code == 0, ended.err
    assert (run / "export" / "gguf-lora" / "adapter-f16.gguf").exists()
    ended = qlora("export", run, "--to", "ollama", "--type", "f16")
    assert ended.code == 0, ended.err
    assert f"next      ollama create my-run -f '{run / 'export' / 'ollama' / 'Modelfile'}'" in ended.out
    assert "<|im_start|>" in (run / "export" / "ollama" / "Modelfile").read_text()


def test_plain_folders_are_exported_to_a_place_that_is_named(run, qlora, tmp_path):
    certify(run, None)
    ended = qlora("export", run / "adapter", "--to", "peft", "--out", tmp_path / "one")
    assert ended.code == 0, ended.err
    ended = qlora("export", run / "merged", "--to", "vllm", "--out", tmp_path / "two")
    assert ended.code == 0, ended.err
    assert "note      the merge was not verified: it has no certificate" in ended.out
    refused(qlora("export", run / "merged", "--to", "vllm"), 2, "Name the new place.")
    refused(qlora("export", run / "merged", "--to", "peft"), 2, "neither a run folder nor a PEFT folder")
    refused(qlora("export", tmp_path / "nowhere", "--to", "vllm"), 2, "no such folder")
    options = ("--to", "vllm", "--merged", run / "merged", "--out", tmp_path / "three")
    refused(qlora("export", run / "merged", *options), 2, "Name the merged folder itself.")


# ── what it trusts ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_certificate_that_did_not_hold_stops_the_export_unless_it_is_forced(run, qlora):
    certify(run, {"held": False})
    refused(qlora("export", run, "--to", "vllm"), 3, "its certificate did not hold")
    assert not (run / "export").exists()
    ended = qlora("export", run, "--to", "vllm", "--force")
    assert ended.code == 0, ended.err
    assert "note      the certificate of the merge did not hold" in ended.out


def test_a_merge_that_was_not_verified_is_told(run, qlora):
    certify(run, None)
    ended = qlora("export", run, "--to", "vllm")
    assert (ended.code, "note      the merge was not verified" in ended.out) == (0, True)


def test_the_merged_model_of_another_adapter_is_refused(run, qlora, tmp_path):
    certify(run, {"held": True}, adapter_digest="0" * 64)
    refused(qlora("export", run, "--to", "vllm"), 3, "was merged from another adapter than")
    certify(run, {"held": True})
    other = Path(shutil.copytree(run / "merged", tmp_path / "other"))
    (other / "merge.json").unlink()
    ended = qlora("export", run, "--to", "vllm", "--merged", other)
    assert "has no merge.json: nothing says that it is of this run" in ended.out


def test_a_damaged_adapter_and_a_run_without_an_end_are_refused(run, qlora):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    refused(qlora("export", run, "--to", "peft"), 2, "adapter_model.safetensors has changed since it was written")
    shutil.rmtree(run / "adapter")
    refused(qlora("export", run, "--to", "peft"), 2, "no finished run there")


def test_a_quantised_merge_is_exported_with_a_note_of_its_cost(run, tmp_path, qlora):
    certify(run, {"held": None}, base="merged", dtype="nf4")
    ended = qlora("export", run, "--to", "vllm", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "quantised to nf4, which has no limit" in ended.out + ended.err
    certify(run, {"held": None}, base="dequantized")
    assert qlora("export", run, "--to", "vllm", "--out", tmp_path / "other").code == 2


@pytest.mark.parametrize("certificate", ["yes", {}, {"held": "yes"}, [], 0])
def test_a_certificate_that_does_not_say_whether_it_held_is_damaged(run, qlora, certificate):
    certify(run, certificate)
    refused(qlora("export", run, "--to", "vllm"), 2, "its certificate does not say whether it held")
    refused(qlora("export", run, "--to", "vllm", "--force"), 2, "its certificate does not say whether it held")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"[1]"])
def test_damaged_records_are_messages(run, qlora, text):
    for name in ("merged/merge.json", "run.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(text)
        refused(qlora("export", run, "--to", "vllm"), 2, f"{run / name}: ")
        (run / name).write_bytes(before)
    for text in (b"{", b"\xff\xfe\x00", b"a: 1\n", b""):
        (run / "resolved.yaml").write_bytes(text)
        ended = qlora("export", run, "--to", "peft")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(f"{run / 'resolved.yaml'}:")


@pytest.mark.parametrize("changes", [{"base": None}, {"base": 3}, {"base": {}}, {"date": 3}, {"date": "soon"}])
def test_a_run_that_does_not_say_its_base_or_its_day_right(run, qlora, changes):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | changes))
    ended = qlora("export", run, "--to", "peft")
    if "date" in changes:
        refused(ended, 2, "no day. Write it as YYYY-MM-DD.")
    else:
        assert ended.code == 0, ended.err


def test_an_adapter_without_weights_or_config_is_refused(run, qlora):
    certify(run, {"held": True})
    (run / "adapter" / "manifest.json").unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "adapter" / name).unlink()
        refused(qlora("export", run, "--to", "vllm"), 2, f"no {name} there" if name.endswith("s") else "no adapter_")


def test_paths_of_the_run_leave_the_card(run, qlora, rows_file):
    (run / "adapter" / "README.md").write_text(f"---\n---\nTrained on {rows_file} in file://{run}, see {Path.cwd()}.\n")
    ended = qlora("export", run, "--to", "peft")
    assert ended.code == 0, ended.err
    card = (run / "export" / "peft" / "README.md").read_text()
    assert card == f"---\n---\nTrained on {rows_file.name} in file://{run.name}, see {Path.cwd().name}.\n"


def test_what_a_plain_merged_folder_does_not_know_is_told(run, qlora, tmp_path):
    certify(run, {"held": True}, adapter=str(run / "adapter"))
    ended = qlora("export", run / "merged", "--to", "vllm", "--out", tmp_path / "out")
    told = f"`qlora export '{run}' --merged '{run / 'merged'}'` takes them along"
    assert told in ended.out


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_places_inside_of_what_is_exported_are_refused(run, qlora):
    certify(run, {"held": True})
    for name in ("adapter", "merged"):
        refused(qlora("export", run, "--to", "vllm", "--out", run / name / "x"), 3, "which is exported")
        refused(qlora("export", run, "--to", "peft", "--out", run / name / "x"), 3, "which is exported")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--to", "ggfu"), "there is no exporter 'ggfu'. Did you mean gguf?"),
        (("--to", "vllm", "--type", "f16"), "--type: says nothing of --to vllm"),
        (("--to", "peft", "--merged", "x"), "--merged: says nothing of --to peft"),
        (("--to", "vllm", "--base-name", "me/base"), "--base-name: says nothing of --to vllm"),
        (("--to", "gguf", "--out", "folder"), "give it a name that ends in .gguf"),
        (("--to", "peft", "--base-name", "me/x\nlicense: evil"), "no hub id and no folder"),
        (("--to", "vllm", "--push", "it"), "'it' is no repository's name"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_done(
    run, qlora, options, told, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    certify(run, {"held": True})
    ended = qlora("export", run, *options)
    assert ended.code == 2
    assert told.lower() in ended.err.lower()
    assert not (run / "export").exists()
    assert not (tmp_path / "folder").exists()


def test_problems_are_one_json_object_where_that_is_asked_for(run, qlora):
    ended = qlora("export", run, "--to", "onnx", "--json")
    (problem,) = json.loads(ended.out)["problems"]
    assert (ended.code, problem["where"]) == (2, "--to")
