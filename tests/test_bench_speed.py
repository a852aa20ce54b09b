"""The benchmark against peers: the same work in every process, or no ratio; its statistics and its arithmetic."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
SHARED = ROOT.parent / "shared" / "data"
HAS_TRL = find_spec("trl") is not None
NAMES = ["ours", "naive", "naive-autocast", *(["trl", "trl-defaults"] if HAS_TRL else [])]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of scripts/bench by its name."""
    monkeypatch.syspath_prepend(str(BENCH))

    def module(name: str) -> ModuleType:
        return __import__(name)

    yield module
    for file in BENCH.glob("*.py"):  # their names are short: another folder may have them too
        sys.modules.pop(file.stem, None)


def run(tmp_path: Path, chosen: str, *options: str) -> tuple[list[str], Any]:
    """The lines that a run prints, and its JSON file's result of the only case."""
    result = tmp_path / "result.json"
    small = ["--turns", "2", "--starts", "1", "--threads", "1", "--data", str(SHARED), "--json", str(result)]
    command = [sys.executable, str(BENCH / "run.py"), chosen, *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(result.read_text())
    assert written["command"][2] == chosen
    assert written["machine"]["cores"] > 0
    return done.stdout.splitlines(), written["results"][0]


def test_contestants_do_the_same_work_in_turns_and_every_measurement_is_written(tmp_path: Path) -> None:
    lines, result = run(tmp_path, "smoke", "--contestants", *NAMES, "axolotl")
    found = result["contestants"]
    assert [*found] == [*NAMES, "axolotl"]
    assert found["axolotl"]["state"] == "not installed"
    assert "axolotl: not installed" in lines
    ours = found["ours"]
    for name in NAMES:
        values = found[name]
        assert values["state"] == "measured", name
        assert values["first"]["losses"][0] == pytest.approx(ours["first"]["losses"][0], abs=1e-2), name
        assert values["trained"] == [2 * 2 * 31] * 2, name
        assert values["padded"] == [2 * 2 * 32] * 2, name
        assert [turn["rows"] for turn in values["steps"]] == [turn["rows"] for turn in ours["steps"]], name
        assert [len(turn["seconds"]) for turn in values["steps"]] == [2, 2], name
        assert values["memory"]["peak_bytes"] > values["memory"]["weights_bytes"] > 2**26, name
        assert 0 < values["start_s"][0] < values["first_step_s"][0], name
        assert values["versions"]["torch"] == torch.__version__, name
    assert ours["steps"][0]["rows"] != ours["steps"][1]["rows"], "every turn takes the next rows"
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == ["contestant", *NAMES]


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_a_whole_pass_trains_the_same_tokens_packed_and_padded(tmp_path: Path) -> None:
    _, result = run(tmp_path, "smoke-pass", "--contestants", "ours", *(["trl-defaults"] if HAS_TRL else ["naive"]))
    ours, other = result["contestants"].values()
    assert ours["state"] == other["state"] == "measured"
    assert ours["first"]["rows"] == other["first"]["rows"]
    assert ours["trained"] == other["trained"]
    assert len(set(ours["trained"])) == 1
    assert max(ours["padded"]) < min(other["padded"]), "packed rows hold no padding"
    assert other["steps_of_pass"] == [3] * 4


def test_a_contestant_that_does_other_work_is_refused_with_the_reason(bench: Any) -> None:
    differences = bench("measure").differences

    def values(rows: int = 7, trained: int = 10, loss: float = 2.0) -> dict[str, Any]:
        first = {"rows": rows, "trained": [10, 30], "losses": [loss, loss + 1]}
        return {"state": "measured", "first": first, "trained": [trained, 10]}

    assert differences(values(), values(loss=2.009)) == []
    assert differences(values(), values(rows=8)) == ["the first rows are others"]
    assert differences(values(), values(trained=9)) == ["the turns' trained tokens are [9, 10], not [10, 10]"]
    assert differences(values(), values(loss=2.011)) == ["the first loss is 2.7610, not 2.7500"]
    assert differences(values(), values(loss=float("nan"))) == ["the first loss is nan, not 2.7500"]


def test_a_refused_contestant_has_a_reason_and_no_ratio(bench: Any) -> None:
    memory = {"peak_bytes": 3e6, "weights_bytes": 1e6}
    ours = {"state": "measured", "seconds": [1.0, 1.0], "trained": [10, 10], "padded": [20, 20], "memory": memory}
    ours |= {"start_s": [2.0], "first_step_s": [3.0], "required_flops": 50.0}
    theirs = {**ours, "seconds": [4.0, 2.0]}
    found = {"ours": ours, "fast": theirs, "wrong": {**theirs, "state": "refused: the first rows are others"}}
    roof = {"bfloat16": 100.0, "float32": 10.0}
    text = bench("report").table(
        {"case": "a case", "compute": "bfloat16", "roof_flops_per_s": roof, "contestants": found}
    )
    assert "| fast | 3 (5) | 7 | 16.7% (25.0%) | 3.00 [2.00, 4.00] | 2.00 | 3 | 2 | – | 2.0 | 3.0 |" in text
    assert "| wrong" not in text
    assert "wrong: refused: the first rows are others" in text


def test_the_interval_of_the_median_ratio_holds_the_pairs_apart(bench: Any) -> None:
    ratio = bench("stats").paired_ratio
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0, 2.0), "a drift that hits both is no spread"
    found = ratio([2.0, 2.2, 1.8, 2.1, 1.9, 9.0, 2.0, 2.1], [1.0] * 8)
    assert found.median == pytest.approx(2.05)
    assert 1.8 < found.low < 2.05 < found.high < 9.0, "one bad turn of eight moves neither end to it"
    assert found.of_minima == 1.8
    assert found == ratio([2.0, 2.2, 1.8, 2.1, 1.9, 9.0, 2.0, 2.1], [1.0] * 8), "the same draws every time"


def test_contestants_go_there_and_back(bench: Any) -> None:
    assert bench("stats").turns(["a", "b", "c"], 3) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


@pytest.mark.parametrize("limit", [0, 511, 512, 1024, 5000, 40_000, 2**17, 10**6])
def test_the_longest_context_is_found_within_three_per_cent(bench: Any, limit: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = bench("context").longest(fits)
    most = min(limit, 2**17)
    assert found <= most
    assert found == 0 if limit < 512 else found >= most - max(511, 0.03 * most)
    assert not found or found in tried, "what is told has been tried"
    assert len(tried) < 16


def test_required_flops_are_those_that_torch_counts(bench: Any) -> None:
    import peft
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = bench("cases").Shape(96, 48, 80, 2, 4, 2)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM(config), lora)
    model.enable_input_require_grads()  # so that the first layer hands a gradient down as all others do
    rows, length = 3, 32
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(shape.vocab, (rows, length))).logits.sum().backward()
    attention = shape.layers * rows * 6 * length**2 * shape.hidden  # eager computes the acausal half too
    required = bench("roof").required_flops(shape, [length] * rows, rows * length, r=8)
    rope = counter.get_total_flops() - required - attention  # an outer product of positions and frequencies
    assert 0 <= rope < 0.001 * required


def test_memory_finds_a_peak_that_is_gone_again(bench: Any) -> None:
    gc.collect()  # what other tests left would go while this one measures
    memory = bench("memory").Memory()
    memory.weights_loaded()
    memory.watch()
    block = torch.ones(2**25)
    del block
    memory.finish()
    figures = memory.figures()
    assert figures["peak_bytes"] - figures["weights_bytes"] == pytest.approx(2**27, rel=0.1)
