"""Compiled layers train as the plain ones do: values, recomputation, resumption; compiled once for all lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from qlora_cli import commands
from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.display import QuietReport
from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.model import compiled
from qlora_cli.model.compiled import check_compiler, compile_layers
from qlora_cli.model.fused import READERS
from qlora_cli.model.recompute import checkpointing_layers, recompute
from qlora_cli.train.step import accumulate
from tests.model.tiny_adapters import CPU, CUT, assert_close, step

needs_compiler = pytest.mark.skipif(
    not compiled._has_cpp_compiler(), reason="torch finds no C++ compiler, or no headers of Python"
)


@pytest.fixture(autouse=True)
def _fresh_graphs():
    """Every test compiles for itself; what was built lies in torch's cache."""
    torch._dynamo.reset()
    counters.clear()


def num_graphs() -> int:
    number: int = counters["stats"]["unique_graphs"]
    return number


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Example(one, [IGNORE_INDEX, *one[1:]], "a row") for one in ids]


def train_on(base: Any, model: Any, packed: bool, *lengths: int) -> None:
    accumulate(base, model, [CUT[packed](rows(*lengths))], sum(lengths) - len(lengths))


def logits(base: Any, model: Any) -> Tensor:
    """Of a few tokens, in evaluation."""
    model.eval()
    with torch.no_grad(), base.compute():
        found: Tensor = model(input_ids=torch.arange(3, 15).view(1, 12)).logits
    model.train()
    return found


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_that_of_plain_layers(build, packed):
    """Also with an evaluation before it, and recomputed; rows of other lengths find their graphs made."""
    base, model = build({"data_type": "nf4"}, dropout=0.3)
    if packed:
        prepare_packing(model, CPU, 259)
    plain, names, before = step(base, model, packed), [*model.state_dict()], logits(base, model)
    assert compile_layers(model) == 2
    assert torch.equal(logits(base, model), before)
    assert num_graphs() == 0, "evaluation runs the plain code"
    ours = step(base, model, packed)
    assert_close(ours, plain)
    assert [*model.state_dict()] == names
    assert torch.equal(logits(base, model), before)
    made = num_graphs()
    assert made > 0
    recompute(base.model, 1)
    assert all(map(torch.equal, step(base, model, packed), ours))
    recompute(base.model, 0)
    assert num_graphs() == made, "layers share their graphs, recomputed or not"
    for lengths in ((31, 7, 12), (20, 20, 9, 3), (50, 8)):
        train_on(base, model, packed, *lengths)
    assert num_graphs() == made


@needs_compiler
def test_in_bfloat16_a_step_is_as_near_to_the_truth(build):
    base, model = build({"data_type": "none", "compute_dtype": "bfloat16"})
    wide, truth_model = build({"data_type": "none", "compute_dtype": "float32"})
    truth_model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    truth, plain = step(wide, truth_model), step(base, model)
    compile_layers(model)
    ours = step(base, model)
    found, theirs, wanted = (torch.cat([one.flatten() for one in some[1:]]) for some in (ours, plain, truth))
    assert 0 < (found - wanted).norm() <= 1.25 * (theirs - wanted).norm() <= 0.1 * wanted.norm()


def test_what_is_known_of_a_layer_from_outside_stays(build):
    _, model = build(target_modules=["q_proj", "up_proj"])
    before = {name: type(module) for name, module in model.named_modules()}
    compile_layers(model)
    for name, module in model.named_modules():
        assert isinstance(module, before[name])
        assert type(module).__name__ == before[name].__name__
    assert all((type(module) in READERS) == (before[name] in READERS) for name, module in model.named_modules())
    changed = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is not before[name]}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == {"0", "1"} | linear
    assert len({type(layer) for layer in checkpointing_layers(model)}) == 1
    assert len(checkpointing_layers(copy.deepcopy(model))) == 2


def run(recipe: Any, **how: Any) -> dict[str, Tensor]:
    """The adapter of a run, which may be paused."""
    torch._dynamo.reset()  # as in a new process
    settings = {"main_process": True, "resume": "auto", "pause_at": None} | how
    commands.train(recipe, b"", QuietReport(), **settings)
    adapter = Path(recipe.output_dir) / "adapter" / "adapter_model.safetensors"
    return load_file(adapter) if adapter.exists() else {}


@needs_compiler
def test_a_run_that_was_stopped_ends_in_the_same_bits(make_recipe, tmp_path):
    def recipe(name: str) -> Any:
        training = {"torch_compile": True, "max_steps": 4, "save_steps": 2, "eval_steps": 2}
        return make_recipe(
            training=training,
            adapter={"dropout": 0.1},
            quantization={"compute_dtype": "bfloat16"},
            output_dir=str(tmp_path / name),
        )

    whole = run(recipe("whole"))
    assert run(recipe("parts"), pause_at=2) == {}
    parts = run(recipe("parts"))
    assert whole.keys() == parts.keys() != set()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_machine_that_cannot_compile_is_told_before_training(make_recipe, monkeypatch):
    with torch._inductor.config.patch({"cpp.cxx": ("there-is-no-such-compiler",)}):
        from torch._inductor.cpp_builder import cpp_compiler_search

        cpp_compiler_search.cache_clear()
        with pytest.raises(UserError, match=r"a C\+\+ compiler and Python's headers: not all are here") as error:
            run(make_recipe(training={"torch_compile": True}))
    assert (error.value.where, error.value.code) == ("training.torch_compile", Exit.ENVIRONMENT)
    assert not (Path(make_recipe().output_dir) / "checkpoints").exists()
    monkeypatch.setattr(compiled, "HAS_TRITON", False)
    with pytest.raises(UserError, match="Triton, a C compiler"):
        check_compiler(torch.device("cuda"))


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(UserError, match="knows no repeated layers"):
        compile_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))
