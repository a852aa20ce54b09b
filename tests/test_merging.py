"""`qlora merge`: what is certified, what is refused, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import Exit
from qlora_cli.merge import fold, merge, place
from qlora_cli.merge.certificate import INT8, LIMITS, ORIGINAL
from qlora_cli.merge.partial import place_of
from qlora_cli.merging import verb
from qlora_cli.merging.record import DTYPES
from tests.conftest import Ended
from tests.merge_runs import change_tensors, contents, finish_run, sign
from tests.tiny import tiny_tokenizer, write_tiny_model

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows_file) -> Path:
    """A finished run in float32, on a base beside it."""
    folder = tmp_path_factory.mktemp("finished")
    return finish_run(folder, write_tiny_model(folder / "base"), rows_file)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to be changed, with its base."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    for path in (tmp_path / "copy" / "run").glob("*.yaml"):
        path.write_text(path.read_text().replace(str(finished.parent), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def merges_of(ended: Ended) -> list[dict[str, Any]]:
    """The merges of a command that was asked for JSON: one object, and nothing but it on stdout."""
    found = json.loads(ended.out)
    assert found.keys() == {"held", "merges"}, found
    return found["merges"]


def inode(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


# ── the certificate holds, or does not ───────────────────────────────────────────────────────────────────────────────


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    real = fold.LowRankRows.added
    patch.setattr(fold.LowRankRows, "added", lambda rows, exact, some: 2 * exact - real(rows, exact.clone(), some))


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    real = fold.LowRankRows.added
    patch.setattr(
        fold.LowRankRows, "added", lambda rows, exact, some: exact + 1.1 * (real(rows, exact.clone(), some) - exact)
    )


def a_module_left_out(patch: pytest.MonkeyPatch) -> None:
    real = merge.folded

    def folded(adapter: Any, one: fold.Fold, weight: torch.Tensor, dtype: torch.dtype) -> Any:
        left_out = one.name == "model.layers.0.mlp.down_proj.weight"
        return real(adapter, replace(one, update=None) if left_out else one, weight, dtype)

    patch.setattr(merge, "folded", folded)


def a_shard_that_rots(patch: pytest.MonkeyPatch) -> None:
    real = verb.certificate_of

    def rotten(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.layers.1.self_attn.v_proj.weight"
        return tensors | {name: tensors[name].roll(1, 0)}

    def certificate_of(folder: Path, *more: Any) -> Any:
        change_tensors(folder / "model.safetensors", rotten)
        return real(folder, *more)

    patch.setattr(verb, "certificate_of", certificate_of)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *((fault, "float32") for fault in (wrong_sign, wrong_scale, a_module_left_out, a_shard_that_rots)),
        *((a_shard_that_rots, dtype) for dtype in ("float16", "bfloat16")),
    ],
)
def test_a_merge_gone_wrong_gets_no_name_until_it_is_accepted(finished, qlora, tmp_path, monkeypatch, fault, dtype):
    out, weights = tmp_path / "out", place_of(tmp_path / "out") / "model.safetensors"
    with monkeypatch.context() as patch:
        fault(patch)
        ended = qlora("merge", finished, "--out", out, "--dtype", dtype)
        assert (ended.code, out.exists()) == (Exit.FAILED, False), ended.out
        assert f"kept aside at {place_of(out)}" in ended.out
        assert "the certificate does NOT hold: mean KL " in ended.out
        assert "To accept it: the same command with a larger --max-kl" in ended.out
        recorded = json.loads((place_of(out) / "merge.json").read_text())["certificate"]
        assert (recorded["held"], recorded["mean_kl"] > recorded["limit"]) == (False, True)
        before = inode(weights)
        again = qlora("merge", finished, "--out", out, "--dtype", dtype, "--json")
        (one,) = merges_of(again)
        assert (again.code, json.loads(again.out)["held"]) == (Exit.FAILED, False)
        assert (one["out"], one["kept"]) == (None, str(place_of(out)))
    ended = qlora("merge", finished, "--out", out, "--dtype", dtype, "--max-kl", 100, "--json")
    assert (ended.code, "; 1 file was there already; comparing" in ended.err) == (0, True), ended.err
    (one,) = merges_of(ended)
    assert (one["certificate"]["held"], one["certificate"]["limit"], one["out"]) == (True, 100, str(out))
    assert json.loads((out / "merge.json").read_text()) == one
    assert not place_of(out).exists()
    if fault is not a_shard_that_rots:
        assert inode(out / "model.safetensors") == before


@pytest.mark.parametrize("dtype", LIMITS)
def test_each_dtype_is_written_and_held_to_its_limit(finished, qlora, tmp_path, dtype):
    (one,) = merges_of(qlora("merge", finished, "--out", tmp_path / "out", "--dtype", dtype, "--json"))
    assert (one["dtype"], one["certificate"]["limit"], one["certificate"]["held"]) == (dtype, LIMITS[dtype], True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {DTYPES[dtype]}
    assert one["bytes"] == sum(tensor.nbytes for tensor in written.values())


def test_a_merge_of_an_int8_base_is_held_to_what_its_activations_cost(tiny_model, rows_file, qlora, tmp_path):
    run = finish_run(tmp_path, tiny_model, rows_file, quantization={"data_type": "int8"})
    ended = qlora("merge", run, "--json")
    (one,) = merges_of(ended)
    assert (ended.code, one["certificate"]["limit"], one["same_base"]) == (0, INT8, True)
    assert LIMITS["float32"] < one["certificate"]["mean_kl"] < INT8


def test_an_unverified_merge_says_so_wherever_it_speaks(finished, qlora, tmp_path):
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--no-verify")
    assert (ended.code, "not verified: neither this model" in ended.out) == (0, True)
    assert "comparing" not in ended.err
    recorded = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (recorded["verified"], recorded["certificate"], recorded["same_base"]) == (False, None, None)
    ended = qlora("merge", finished, "--out", tmp_path / "other", "--no-verify", "--max-kl", 1)
    assert (ended.code, "--no-verify: leaves nothing for --rows and --max-kl" in ended.err) == (Exit.USAGE, True)


# ── both bases ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_bases_are_written_side_by_side(finished, qlora, tmp_path):
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--base", "both")
    assert ended.code == 0, ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-original"}
    table = ended.out[ended.out.index("unmerged loss") :].splitlines()
    assert [base in line for line in table for base in ("dequantized, float32", "original, float32")].count(True) == 2
    found = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("out", "out-original")]
    assert [one["base"] for one in found] == ["dequantized", "original"]
    assert [one["certificate"]["limit"] for one in found] == [LIMITS["float32"], ORIGINAL]
    assert found[0]["certificate"]["mean_kl"] < 1e-9 < found[1]["certificate"]["mean_kl"]


def test_of_both_the_one_that_holds_is_kept_and_the_other_can_be_accepted_later(finished, qlora, tmp_path):
    command = ["merge", finished, "--out", tmp_path / "out", "--base", "both", "--json", "--max-kl"]
    ended = qlora(*command, 1e-7)
    assert [one["out"] for one in merges_of(ended)] == [str(tmp_path / "out"), None]
    assert (ended.code, (tmp_path / "out-original").exists()) == (Exit.FAILED, False)
    before = inode(tmp_path / "out" / "model.safetensors")
    ended = qlora(*command, 100)
    assert ended.code == 0, ended.err
    assert [one["out"] for one in merges_of(ended)] == [str(tmp_path / "out"), str(tmp_path / "out-original")]
    assert inode(tmp_path / "out" / "model.safetensors") == before


# ── quantised again ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_merge_written_in_nf4_loads_in_plain_transformers_and_states_its_cost(finished, qlora, tmp_path):
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--quantize", "nf4", "--json")
    assert ended.code == 0, ended.err
    merged, stored = merges_of(ended)
    assert (stored["out"], stored["dtype"], stored["base"]) == (str(tmp_path / "out-nf4"), "nf4", "merged")
    assert json.loads((tmp_path / "out-nf4" / "merge.json").read_text()) == stored
    assert stored["bytes"] < merged["bytes"] / 2
    assert stored["certificate"]["mean_kl"] > 1e-5 > merged["certificate"]["mean_kl"]
    assert (stored["certificate"]["limit"], stored["certificate"]["loss_unmerged"]) == (
        None,
        merged["certificate"]["loss_unmerged"],
    )
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "qlora_cli" not in sys.modules
assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
ids = AutoTokenizer.from_pretrained(sys.argv[1])("say 3", return_tensors="pt").input_ids
assert torch.isfinite(model(ids).logits).all()
"""
    plain = subprocess.run([sys.executable, "-c", script, stored["out"]], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr


def test_an_existing_merge_is_quantised_and_not_made_again(finished, qlora, tmp_path):
    assert qlora("merge", finished, "--out", tmp_path / "out").code == 0
    before = weights_and_settings(tmp_path / "out")
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--quantize", "int2", "--json")
    assert ended.code == 0, ended.err
    assert "and its weights stay" in ended.err
    assert [one["dtype"] for one in merges_of(ended)] == ["float32", "int2"]
    assert [one["certificate"]["held"] for one in merges_of(ended)] == [True, None]
    assert weights_and_settings(tmp_path / "out") == before
    import qlora_cli.quant.plugin  # noqa: F401

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out-int2")
    assert torch.isfinite(loaded(input_ids=torch.arange(3, 20).unsqueeze(0)).logits).all()
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--quantize", "int2")
    assert (ended.code, "out-int2: it exists and is not an empty folder" in ended.err) == (Exit.USAGE, True)


def weights_and_settings(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file but the certificate's two."""
    return {path.name: inode(path) for path in folder.iterdir() if path.name not in ("merge.json", "README.md")}


def test_a_merge_that_is_there_gets_the_certificate_that_is_asked_for_now(finished, qlora, tmp_path):
    command = ["merge", finished, "--out", tmp_path / "out"]
    assert qlora(*command, "--max-kl", 100, "--rows", 1).code == 0
    before = weights_and_settings(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    assert "1e+02, asked for (1e-06 by default)" in card.read_text()
    card.write_text("My words.\n" + card.read_text())
    ended = qlora(*command)
    assert (ended.code, "limit 1e-06" in ended.out) == (0, True), ended.out
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["certificate"]["rows"], record["certificate"]["limit"]) == (4, LIMITS["float32"])
    assert "asked for" not in card.read_text()
    assert card.read_text().startswith("My words.\n")
    ended = qlora(*command, "--max-kl", 0)
    assert (ended.code, "does NOT hold" in ended.out) == (Exit.FAILED, True), ended.out
    assert weights_and_settings(tmp_path / "out") == before
    ended = qlora(*command, "--dtype", "bfloat16")
    assert (ended.code, "with dtype float32, and bfloat16 is asked for" in ended.err) == (Exit.USAGE, True), ended.err


@pytest.mark.parametrize("kind", ["nf4", "int2"])
def test_a_quantised_merge_is_measured_and_spoken_with_as_it_is_stored(finished, qlora, tmp_path, kind):
    assert qlora("merge", finished, "--out", tmp_path / "out", "--quantize", kind).code == 0
    stored = tmp_path / f"out-{kind}"
    ended = qlora("eval", finished, "--merged", stored, "--limit", 2, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["models"]
    assert found[f"merged-out-{kind}"]["loss"] != found["adapter"]["loss"]
    assert qlora("chat", stored, "--prompt", "say 3", "--max-new-tokens", 2).code == 0
    assert {path.stat().st_mode & 0o777 for path in stored.iterdir()} == {0o666 & ~umask()}


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


@pytest.mark.parametrize("changed", ["adapter_digest", "base", "dtype"])
def test_a_merge_of_something_else_is_not_taken_up(finished, qlora, tmp_path, changed):
    assert qlora("merge", finished, "--out", tmp_path / "out", "--no-verify").code == 0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    (tmp_path / "out" / "merge.json").write_text(json.dumps(record | {changed: "another"}))
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--quantize", "nf4", "--no-verify")
    assert (ended.code, "nothing is overwritten" in ended.err) == (Exit.USAGE, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ── another base, another adapter ────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_of_another_base_is_refused_unless_that_is_wanted(run, qlora, tmp_path):
    base = run.parent / "base"
    change_tensors(base / "model.safetensors", lambda tensors: {name: one * 1.2 for name, one in tensors.items()})
    ended = qlora("merge", run, "--out", tmp_path / "out")
    assert (ended.code, list(tmp_path.iterdir())) == (Exit.REFUSED, [run.parent])
    assert f"{base}: is not the base that the adapter was trained on: its weights, config or data type" in ended.err
    assert "Bring that one back, or go on with --other-base." in ended.err
    ended = qlora("merge", run, "--out", tmp_path / "out", "--other-base")
    assert ended.code == 0, ended.err
    assert "note     the base is not the one that the adapter was trained on" in ended.out
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["same_base"] is False


def a_key_less(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj.lora_A" not in name}


def a_module_less(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}


def a_key_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}


def another_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    return tensors | {name: tensors[name][:-1]}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", [a_key_less, a_module_less, a_key_more, another_shape])
def test_an_adapter_that_does_not_fit_is_refused(run, qlora, tmp_path, change, verify):
    change_tensors(run / "adapter" / ADAPTER, change)
    sign(run / "adapter")
    ended = qlora("merge", run, "--out", tmp_path / "out", *([] if verify else ["--no-verify"]))
    assert (ended.code, ended.out, list(tmp_path.iterdir())) == (Exit.USAGE, "", [run.parent]), ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(str(run / "adapter")), last
    if not (change is another_shape and verify):  # of which PEFT's message has no more than that
        assert "layers.7" in last if change is a_key_more else "layers.1.mlp.up_proj" in last
    assert "the base" in last or "copy the adapter folder again" in last.lower()


def test_a_tokenizer_of_other_tokens_beside_the_adapter_is_refused(run, qlora, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(run / "adapter")
    sign(run / "adapter")
    for verify in ([], ["--no-verify"]):
        ended = qlora("merge", run, "--out", tmp_path / "out", *verify)
        assert (ended.code, list(tmp_path.iterdir())) == (Exit.REFUSED, [run.parent])
        assert f"{run / 'adapter' / 'tokenizer.json'}: its 260 tokens are not the 259 of the base in " in ended.err
        assert "Bring back the tokenizer that was trained with." in ended.err


def test_an_adapter_without_a_tokenizer_gets_the_base_s(run, qlora, tmp_path):
    for path in run.glob("adapter/tokenizer*"):
        path.unlink()
    described = json.loads((run / "adapter" / "manifest.json").read_text())["files"]
    kept = {name: facts for name, facts in described.items() if not name.startswith("tokenizer")}
    (run / "adapter" / "manifest.json").write_text(json.dumps({"files": kept}))
    assert qlora("merge", run, "--out", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]


# ── the rows, and what is said of them ───────────────────────────────────────────────────────────────────────────────


def pair(number: int) -> dict[str, Any]:
    return {"source": f"word {number}", "target": f"{'w' * (number % 4 + 1)} {number}"}


def labelled(number: int) -> dict[str, Any]:
    return {"text": "a" * (number % 5 + 1), "label": ["no", "yes"][number % 2]}


def scored(number: int) -> dict[str, Any]:
    return {"text": f"so much: {'x' * number}", "score": number / 4}


def asked(number: int) -> dict[str, Any]:
    colour = ("red", "green", "blue")[number % 3]
    context = f"{'it was late. ' * (number % 3)}the ball is {colour} today"
    answers = {"text": [colour], "answer_start": [context.index(colour)]}
    return {"id": str(number), "question": "which?", "context": context, "answers": answers}


CLASSES = {"task": "sequence_classification"}
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Any]], str]] = {
    "seq2seq_lm": ("bart", {"task": "seq2seq_lm"}, pair, "positions"),
    "classes": ("bert", CLASSES | {"labels": ["no", "yes"]}, labelled, "over 30 rows: largest difference of an output"),
    "regression": ("roberta", CLASSES | {"num_labels": 1}, scored, "over 30 rows: largest difference of an output"),
    "question_answering": ("deberta", {"task": "question_answering"}, asked, "ends of spans: largest logit"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_certified_with_the_loss_that_eval_measures(architecture, qlora, tmp_path, monkeypatch, kind):
    name, model, row, words = KINDS[kind]
    for file, numbers in (("rows", range(16)), ("heldout", range(16, 46))):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    sections = {"model": model, "data": {"max_length": 60}, "evaluation": {"suites": [{"suite": "loss"}]}}
    run = finish_run(tmp_path, architecture(name), tmp_path / "rows.jsonl", **sections)
    ended = qlora("merge", run, "--rows", 10**6)
    assert (ended.code, words in ended.out) == (0, True), ended.err + ended.out
    found = json.loads((run / "merged" / "merge.json").read_text())["certificate"]
    assert (found["data"], found["mean_kl"] < 1e-9) == ("eval", True)
    measured = json.loads(qlora("eval", run, "--merged", run / "merged", "--json").out)["models"]
    assert found["loss_unmerged"] == pytest.approx(measured["adapter"]["loss.loss"], rel=1e-4)
    assert found["loss_merged"] == pytest.approx(measured["merged"]["loss.loss"], rel=1e-4)
    monkeypatch.setattr(place, "available_memory", lambda: 10)
    ended = qlora("merge", run, "--rows", 10**6, "--out", tmp_path / "streamed", "--json")
    (one,) = merges_of(ended)
    assert (one["certificate"]["manner"], one["certificate"]["held"]) == ("streamed", True)
    assert one["certificate"]["loss_merged"] == pytest.approx(found["loss_merged"], rel=1e-5)


def test_the_loss_over_all_held_out_rows_is_that_of_eval(finished, qlora, tmp_path):
    (one,) = merges_of(qlora("merge", finished, "--out", tmp_path / "out", "--rows", 10**6, "--json"))
    measured = json.loads(qlora("eval", finished, "--suite", "loss", "--json").out)["models"]["adapter"]["loss"]
    assert one["certificate"]["loss_unmerged"] == pytest.approx(measured, rel=1e-4)
    assert one["certificate"]["rows"] == 4


def test_rows_that_are_asked_for_are_those_that_are_read(finished, qlora, tmp_path):
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--rows", 2, "--json")
    assert merges_of(ended)[0]["certificate"]["rows"] == 2


def test_without_held_out_rows_training_rows_are_read_and_it_is_said(tiny_model, rows_file, qlora, tmp_path):
    run = finish_run(tmp_path, tiny_model, rows_file, data={"eval": []}, evaluation={"suites": []})
    ended = qlora("merge", run)
    assert (ended.code, "loss over 12 rows of data.train: unmerged " in ended.out) == (0, True), ended.err


def test_what_is_too_large_for_the_memory_is_certified_from_the_disk(finished, qlora, tmp_path, monkeypatch):
    (whole,) = merges_of(qlora("merge", finished, "--out", tmp_path / "whole", "--json"))
    monkeypatch.setattr(place, "available_memory", lambda: 10)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = qlora("merge", finished, "--out", tmp_path / "streamed")
    assert "; the merged model was read from the disk layer by layer" in ended.out
    assert "offload" not in ended.err
    streamed = json.loads((tmp_path / "streamed" / "merge.json").read_text())["certificate"]
    assert (whole["certificate"]["manner"], streamed["manner"]) == ("whole", "streamed")
    for figure in ("mean_kl", "p99_kl", "max_abs"):
        assert streamed[figure] == pytest.approx(whole["certificate"][figure], abs=1e-6)
    assert streamed["loss_merged"] == pytest.approx(whole["certificate"]["loss_merged"], rel=1e-6)
    assert (list((tmp_path / "here").iterdir()), sorted(path.name for path in tmp_path.iterdir())) == (
        [],
        ["here", "streamed", "whole"],
    )
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "streamed")]
    assert files[0] == files[1]


# ── what it stands on, and how it speaks ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fast", [True, False])
def test_a_merge_computes_as_the_run_did_wherever_it_is_made(tiny_model, rows_file, qlora, tmp_path, monkeypatch, fast):
    """`auto` means bfloat16 on a machine that is fast at it; the merge is made on one of the other kind."""

    def machine(is_fast: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: is_fast)

    machine(fast)
    run = finish_run(tmp_path, tiny_model, rows_file, quantization={"compute_dtype": "auto"})
    machine(not fast)
    (one,) = merges_of(qlora("merge", run, "--json"))
    assert one["dtype"] == ("bfloat16" if fast else "float32")
    assert (one["same_base"], one["certificate"]["held"]) == (True, True)


def test_a_user_s_process_prints_the_result_alone_and_says_the_rest_on_stderr(finished, tmp_path):
    command = [sys.executable, "-m", "qlora_cli", "merge", str(finished), "--out", "merged", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (one,) = merges_of(Ended(done.returncode, done.stdout, done.stderr))
    assert one["out"] == "merged"
    assert "Warning" not in done.stderr
    for line in done.stderr.splitlines():
        assert line.startswith(("eval ", "merged ")), line
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_problems_are_one_object_too(finished, qlora, tmp_path):
    (tmp_path / "out").write_text("mine")
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--json")
    (problem,) = json.loads(ended.out)["problems"]
    assert (ended.code, problem["where"]) == (Exit.USAGE, str(tmp_path / "out"))


def test_a_merge_is_the_same_to_the_last_bit_whenever_it_is_made(finished, qlora, tmp_path):
    for name in ("one", "two"):
        assert qlora("merge", finished, "--out", tmp_path / name).code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_merge_onto_a_base_that_the_start_changed_is_certified_and_the_published_weights_are_refused(
    tiny_model, rows_file, qlora, tmp_path
):
    run = finish_run(tmp_path, tiny_model, rows_file, adapter={"init": "loftq", "loftq": {"iterations": 1}})
    ended = qlora("merge", run, "--json")
    (one,) = merges_of(ended)
    assert (one["certificate"]["limit"], one["certificate"]["mean_kl"] < 1e-9) == (LIMITS["float32"], True)
    for base in ("original", "both"):
        ended = qlora("merge", run, "--out", tmp_path / "out", "--base", base)
        assert (ended.code, (tmp_path / "out").exists()) == (Exit.REFUSED, False)
        assert "is what the adapter was trained on; the weights as published are others" in ended.err


def test_added_tokens_are_in_the_merged_model_and_in_its_tokenizer(tiny_model, rows_file, qlora, tmp_path):
    run = finish_run(tmp_path, tiny_model, rows_file, model={"added_tokens": ["<new>"]})
    ended = qlora("merge", run, "--quantize", "nf4", "--json")
    assert ended.code == 0, ended.err
    for one in merges_of(ended):
        vocabulary = json.loads((Path(one["out"]) / "tokenizer.json").read_text())["added_tokens"]
        assert (vocabulary[-1]["content"], vocabulary[-1]["id"]) == ("<new>", 259)
        assert json.loads((Path(one["out"]) / "config.json").read_text())["vocab_size"] == 260
