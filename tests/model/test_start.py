"""Every layer of a start is as far from its weight as its line of the table says, by PEFT's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import UserError
from qlora_cli.model import calibration
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.start import STARTS, Line, adapted_layers, changes_base, start_layers
from qlora_cli.quant.data_types import CODES
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.rules import STORES_ITS_BASE
from qlora_cli.recipe.schema import Adapter
from tests.tiny import write_tiny_gpt2

ROWS = [list(range(3, 40)), [7, 9, 200, 31, 5], list(range(250, 190, -1))]
"""Token ids of calibration rows, of unequal length."""

PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {
        "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"k_proj": 3, r"model.layers.[01].self_attn.q_proj": 11},
    },
    "gpt2": {"rank_pattern": {"c_fc": 16}, "alpha_pattern": {"c_attn": 1, r"h.1.mlp.c_proj": 3}},
}


class Case(NamedTuple):
    """Sections of a recipe; patterns: with those of its architecture."""

    quantization: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    adapter: dict[str, Any] = {}  # noqa: RUF012
    patterns: bool = False


CASES = {
    **{name: Case({"data_type": name}) for name in CODES},
    "int4 with zero points": Case({"data_type": "int4", "zero_point": True, "double_quant": False, "block_size": 32}),
    "in bfloat16": Case({"data_type": "int4", "compute_dtype": "bfloat16"}),
    "the other order": Case({}, {"loftq": {"order": "svd_first", "iterations": 2}}),
    "other scalings": Case({"data_type": "int2"}, {"alpha": 1}, patterns=True),
    "other scalings by rsLoRA": Case({"data_type": "int2"}, {"use_rslora": True}, patterns=True),
    "more rank than the weights have": Case({"data_type": "int2"}, {"r": 100, "alpha": 25}),
    "mixed": Case({"data_type": "int2", "overrides": {"*[qc]_proj": "none", "*.1.*": "nf4"}}),
    "pissa": Case({}, {"init": "pissa", "alpha": 1}),
    "pissa, unquantised": Case({"data_type": "none"}, {"init": "pissa"}, patterns=True),
    "olora": Case({"data_type": "int2"}, {"init": "olora", "use_rslora": True}),
    "olora, in bfloat16": Case({"data_type": "none", "compute_dtype": "bfloat16"}, {"init": "olora", "r": 8}),
}


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, and a GPT-2 under the hub's names."""
    return {"llama": tiny_model, "gpt2": write_tiny_gpt2(tmp_path_factory.mktemp("bases") / "gpt2")}


def recipe_on(folder: Path, quantization: dict[str, Any], adapter: dict[str, Any]) -> Recipe:
    """A recipe of a start on the model in a folder: LoftQ's in float32, unless it says otherwise."""
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "quantization": {"compute_dtype": "float32", **quantization},
            "adapter": {"init": "loftq", "r": 4, "alpha": 8, **adapter},
            "data": {"train": [{"path": "rows.jsonl"}]},
        }
    )


def started(recipe: Recipe, rows: list[list[int]] | None = None) -> tuple[Base, Any, dict[str, Line]]:
    """The changed base, the model that stands on it, and the lines of the table by module."""
    base = load_base(recipe, torch.device("cpu"), packed=True)
    torch.manual_seed(0)
    model = attach_adapter(base, recipe.adapter)
    lines = {line.module: line for line in start_layers(recipe, base, model, rows or [])}
    assert lines.keys() == adapted_layers(model).keys()
    return base, model, lines


def multiplied(layer: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) fp32: what a layer multiplies with, without its adapter."""
    if isinstance(layer, PackedLinear):
        return layer.dequantized(dtype).float()
    weight = layer.weight.detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def added(layer: Any) -> Tensor:
    """(out, in) fp32: what PEFT says that the adapter adds."""
    delta = layer.get_delta_weight("default").detach().float()
    return delta.T if isinstance(layer.base_layer, Conv1D) else delta


def published(folder: Path) -> dict[str, Tensor]:
    """(out, in) fp32: the weights of the checkpoint by the names of their modules."""
    tensors = load_file(folder / "model.safetensors").items()
    found = {name.removesuffix(".weight"): tensor for name, tensor in tensors if tensor.dim() == 2}
    return {f"transformer.{name}": t.T for name, t in found.items()} if "wte" in found else found


def distance(weight: Tensor, other: Tensor) -> float:
    return float((weight.double() - other.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", PATTERNS)
def test_the_table_says_what_peft_computes(family, name, folders):
    quantization, adapter, patterns = CASES[name]
    recipe = recipe_on(folders[family], quantization, {**adapter, **(PATTERNS[family] if patterns else {})})
    plain = load_base(recipe, torch.device("cpu"), packed=True)
    base, model, lines = started(recipe)
    weights = published(folders[family])
    seen = set()
    for module, layer in adapted_layers(model).items():
        before = distance(weights[module], multiplied(plain.model.get_submodule(module), base.compute_dtype))
        after = distance(weights[module], multiplied(layer.base_layer, base.compute_dtype) + added(layer))
        assert lines[module].after == pytest.approx(after, rel=1e-4, abs=2e-6)
        # a model that loads in bfloat16 is rounded to it before it is quantised, and a start is not
        assert lines[module].before == pytest.approx(before, rel=3e-3 if "bfloat16" in name else 1e-4, abs=2e-6)
        assert lines[module].rank == min(layer.r["default"], *weights[module].shape)
        assert recipe.adapter.init != "loftq" or after <= before + 1e-7
        assert (layer.lora_B["default"].weight.norm() > 0) == (lines[module].iteration > 0)
        seen.add((layer.r["default"], layer.scaling["default"]))
    assert len(seen) > 2 if patterns else len(seen) == 1, "the layers do not differ"
    assert (
        recipe.adapter.init != "loftq"
        or max(1 - line.after / line.before for line in lines.values() if line.before) > 0.1
    )


def test_what_is_beyond_the_rank_of_a_weight_adds_nothing(folders):
    recipe = recipe_on(folders["llama"], {"data_type": "nf2"}, {"r": 100, "alpha": 100})
    _base, model, lines = started(recipe)
    layer = adapted_layers(model)["model.layers.0.self_attn.k_proj"]  # (32, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((100, 64), (32, 100))
    assert b[:, :32].norm(dim=0).min() > 0
    assert b[:, 32:].norm() == 0
    assert a[32:].norm(dim=1).min() > 0, "it could never learn"
    assert lines["model.layers.0.self_attn.k_proj"].after < 1e-5, "a full rank makes all good"


def test_a_layer_that_loses_nothing_keeps_the_default_start(folders):
    recipe = recipe_on(folders["llama"], {"data_type": "int2", "overrides": {"*.q_proj": "none"}}, {})
    _base, model, lines = started(recipe)
    line = lines["model.layers.0.self_attn.q_proj"]
    assert (line.before, line.after, line.iteration) == (0.0, 0.0, 0)
    layer = adapted_layers(model)[line.module]
    assert layer.lora_B["default"].weight.norm() == 0 < layer.lora_A["default"].weight.norm()
    assert torch.equal(layer.base_layer.weight, published(folders["llama"])[line.module])


def test_the_recipe_offers_every_start():
    offered = set(get_args(Adapter.model_fields["init"].annotation))
    assert {init for init in offered if changes_base(Adapter(init=init))} == set(STARTS)
    assert offered - set(STARTS) == {"default", "gaussian"}
    assert set(STORES_ITS_BASE) == set(STARTS), "the recipe's rules know them too"


def inputs_of(folder: Path, rows: list[list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """(tokens, in): what each linear layer of the plain model is fed, the rows in one padded batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.update({name: args[0][mask.bool()]})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_second_moments_are_those_of_the_inputs_and_padding_is_none(family, folders):
    seen = inputs_of(folders[family], ROWS, torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    found = calibration.second_moments(model, [*seen], ROWS)
    for name, x in seen.items():
        assert len(x) == sum(map(len, ROWS))
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules()), "a hook is left"
    if family == "llama":
        attention, mlp = ("model.layers.1.self_attn.", "model.layers.1.mlp.")
        assert found[f"{attention}q_proj"] is found[f"{attention}k_proj"] is found[f"{attention}v_proj"]
        assert found[f"{mlp}gate_proj"] is found[f"{mlp}up_proj"]
        assert len({id(moment) for moment in found.values()}) == 2 * 4 + 1, "layers that are fed alike share one"


class Forked(nn.Module):
    """Two linear layers, of which no row reaches the second."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.reached(torch.stack([input_ids, input_ids + 1], dim=-1).float())


def test_a_module_that_no_row_reaches_has_no_moment():
    found = calibration.second_moments(Forked(), ["reached", "idle"], [[1, 2], [3]])
    assert found.keys() == {"reached"}
    assert torch.equal(found["reached"] * 3, torch.tensor([[14.0, 20.0], [20.0, 29.0]]))


def test_the_square_root_is_one_where_the_rows_span_less_than_the_inputs():
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(0)) * 100
    moment = x.T @ x / 5
    root = calibration.square_root(moment, "q_proj")
    damped = moment + calibration.DAMPING * moment.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(root @ root.T, damped, rtol=1e-4, atol=1e-2)
    assert torch.equal(root, root.tril())
    assert calibration.square_root(torch.zeros(4, 4), "q_proj").isfinite().all()


def test_a_moment_that_rounding_made_indefinite_has_a_root_all_the_same():
    x = torch.randn((64, 64), generator=torch.Generator().manual_seed(0)).double()
    turned = torch.linalg.qr(x).Q
    moment = ((turned * torch.tensor([1000.0, *[-0.05] * 63])) @ turned.T).float()  # damping's first step adds 0.016
    root = calibration.square_root((moment + moment.T) / 2, "q_proj")
    assert (root @ root.T - moment).norm() < 0.2 * moment.norm()


def test_inputs_that_are_not_finite_are_told_with_their_module():
    moment = torch.eye(4).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(UserError, match=r"adapter\.loftq\.calibration: the inputs of v_proj are not finite"):
        calibration.square_root(moment, "v_proj")


CALIBRATED = {"loftq": {"calibration": len(ROWS)}}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_calibrated_start_errs_less_in_what_comes_out_of_the_layers(family, folders):
    """(W - Q - s B A) X over the very rows; the table says the error, the damping of the moments included."""
    seen, weights = inputs_of(folders[family], ROWS, torch.float32), published(folders[family])
    errors = {}
    for name, adapter in (("aware", CALIBRATED), ("unaware", {})):
        _base, model, lines = started(
            recipe_on(folders[family], {"data_type": "int2"}, adapter), ROWS if adapter else []
        )
        layers = adapted_layers(model)
        lost = {
            module: weights[module] - multiplied(layer.base_layer, torch.float32) - added(layer)
            for module, layer in layers.items()
        }
        errors[name] = {module: float((seen[module] @ lost[module].T).norm()) for module in layers}
        for module, line in lines.items() if adapter else ():
            root = calibration.square_root(seen[module].T @ seen[module] / len(seen[module]), module)
            said = float((lost[module] @ root).norm() / (weights[module] @ root).norm())
            assert line.after == pytest.approx(said, rel=1e-3)
            assert line.after <= line.before
    ratios = torch.tensor([errors["aware"][module] / errors["unaware"][module] for module in errors["aware"]])
    assert ratios.max() < 1.02, "no promise of a quantiser, but near"
    assert ratios.mean() < 0.9


def test_several_passes_over_the_rows_give_the_start_of_one(folders, monkeypatch):
    recipe = recipe_on(folders["llama"], {"data_type": "int2"}, CALIBRATED)
    sizes = []
    whole = calibration.second_moments
    monkeypatch.setattr(
        calibration,
        "second_moments",
        lambda model, names, rows: (sizes.append(len(names)), whole(model, names, rows))[1],
    )
    once = started(recipe, ROWS)
    assert sizes == [14]
    monkeypatch.setattr(calibration, "MOST_BYTES", 3 * 4 * 64**2)  # an input of 128 takes more than that alone
    sizes.clear()
    often = started(recipe, ROWS)
    assert sizes == [3, 3, 1] * 2
    assert once[2] == often[2]
    ours, theirs = ({name: t for name, t in found[1].state_dict().items() if t is not None} for found in (once, often))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
