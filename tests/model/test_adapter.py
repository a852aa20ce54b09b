"""The adapter: what the recipe says is what PEFT builds, and a target that matches nothing says what would."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import attach_adapter, load_adapter, save_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.owner import Owner
from tests.architectures import shift_adapter
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def attach(make_recipe):
    """Attaches an adapter to a fresh tiny base, seed 0 before."""

    def build(base_seed: int = 0, quantization: dict | None = None, **adapter):
        recipe = make_recipe(adapter={"r": 4, "alpha": 8, **adapter}, quantization=quantization or {})
        base = load_base(recipe, CPU)
        torch.manual_seed(base_seed)
        return attach_adapter(base, recipe.adapter)

    return build


def adapted(model) -> set[str]:
    """Full names of the modules that carry a LoRA pair."""
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


def layer(model, name: str = "model.layers.1.self_attn.q_proj"):
    return model.base_model.model.get_submodule(name)


def test_all_linear_means_every_linear_layer_but_the_head(attach):
    names = adapted(attach())
    assert {name.rsplit(".", 1)[-1] for name in names} == LINEAR
    assert len(names) == 14


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "up_proj"], {"self_attn.q_proj", "mlp.up_proj"}),
        ("q_proj", {"self_attn.q_proj"}),
        (r".*\.mlp\..*", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    ],
)
def test_targets_by_name_and_pattern(attach, targets, expected):
    names = adapted(attach(target_modules=targets))
    assert names == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in expected}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*q_proj"])
def test_layers_narrow_the_targets(attach, targets):
    names = adapted(attach(target_modules=targets, layers=[1]))
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)


def test_the_head_may_be_named_where_it_is_not_tied(attach):
    assert "lm_head" in adapted(attach(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            r"target_modules: 'query' matches no module\. Choose from down_proj, g",
        ),
        ({"target_modules": "query"}, r"'query' matches no module\. Choose from .*lm_head.*v_proj"),
        ({"target_modules": "q_proj("}, r"'q_proj\(' is no regular expression"),
        ({"layers": [5]}, r"adapter\.layers: no layer 5\. Choose from 0 to 1"),
        ({"rank_pattern": {"query": 8}}, r"adapter\.rank_pattern: 'query' matches no module\. Choose from down_proj"),
        ({"alpha_pattern": {"query": 8.0}}, r"adapter\.alpha_pattern: 'query' matches no module"),
        ({"modules_to_save": ["head"]}, r"adapter\.modules_to_save: 'head' matches no module\. Perhaps lm_head\?"),
    ],
)
def test_what_matches_nothing_is_an_error_that_lists_what_would(attach, adapter, message):
    with pytest.raises(UserError, match=message):
        attach(**adapter)


def test_one_side_of_a_tied_embedding_is_trained_apart_from_the_other(make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    recipe = make_recipe(model={"name_or_path": str(folder)}, adapter={"modules_to_save": ["lm_head"]})
    base = load_base(recipe, CPU)
    before = base.model.get_input_embeddings().weight.clone()
    model = attach_adapter(base, recipe.adapter)
    shift_adapter(model)
    assert torch.equal(base.model.get_input_embeddings().weight, before)
    assert not torch.equal(base.model.get_output_embeddings().weight, before)


@pytest.mark.parametrize("data_type", ["nf4", "int8", "none"])
def test_the_masters_are_fp32_whatever_the_base(attach, data_type):
    model = attach(quantization={"data_type": data_type, "compute_dtype": "bfloat16"}, modules_to_save=["lm_head"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert any("lm_head" in name for name in trainable)


def test_rank_alpha_and_their_patterns(attach):
    model = attach(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4.0})
    attention = layer(model, "model.layers.0.self_attn")
    assert attention.q_proj.lora_A["default"].weight.shape == (2, 64)
    assert attention.k_proj.lora_A["default"].weight.shape == (4, 64)
    assert attention.q_proj.scaling["default"] == 8 / 2
    assert attention.k_proj.scaling["default"] == 8 / 4
    assert attention.v_proj.scaling["default"] == 4 / 4


def test_rslora_scales_by_the_root_of_the_rank(attach):
    assert layer(attach(use_rslora=True)).scaling["default"] == 8 / math.sqrt(4)


def test_dora_trains_a_magnitude(attach):
    assert "default" in layer(attach(use_dora=True)).lora_magnitude_vector


def test_dropout_is_the_recipes(attach):
    assert layer(attach(dropout=0.25)).lora_dropout["default"].p == 0.25


def test_b_starts_at_zero_and_a_as_asked(attach):
    default, gaussian = layer(attach()), layer(attach(init="gaussian"))
    for start in (default, gaussian):
        assert not start.lora_B["default"].weight.any()
    bound = math.sqrt(6 / ((1 + 5) * 64))  # Kaiming-uniform with a = sqrt(5)
    assert default.lora_A["default"].weight.abs().max() <= bound
    assert gaussian.lora_A["default"].weight.std().item() == pytest.approx(1 / 4, rel=0.2)


def test_the_seed_decides_the_start(attach):
    one, same, other = (layer(attach(base_seed=seed)).lora_A["default"].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.fixture
def saved(attach, tmp_path) -> Path:
    """An adapter folder with a B that is not zero."""
    model = attach()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter", Owner("some/base"))
    return tmp_path / "adapter"


def test_a_saved_adapter_loads_equal_and_in_plain_peft(saved, make_recipe):
    recipe = make_recipe()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        ours = load_adapter(load_base(recipe, CPU), saved).eval()(ids).logits
        plain = peft.PeftModel.from_pretrained(load_base(recipe, CPU).model, str(saved)).eval()(ids).logits
        base = load_base(recipe, CPU).model(ids).logits
    assert torch.equal(ours, plain)
    assert not torch.allclose(ours, base)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert len(config["target_modules"]) > 1
    assert config["target_modules"] == sorted(config["target_modules"]), "PEFT's order is another one in every process"


def test_from_continues_an_adapter_with_its_weights_trainable(saved, make_recipe):
    recipe = make_recipe(adapter={"from": str(saved)})
    model = attach_adapter(load_base(recipe, CPU), recipe.adapter)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    expected = load_file(saved / "adapter_model.safetensors")
    got = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_quantised_module_cannot_be_trained_in_full(attach):
    with pytest.raises(UserError, match=r"q_proj is quantised, .* Add q_proj to quantization\.skip_modules"):
        attach(modules_to_save=["q_proj"])
    with pytest.raises(UserError, match=r"embed_tokens is quantised.*Set quantization.embeddings: none"):
        attach(quantization={"embeddings": "nf4"}, modules_to_save=["embed_tokens"])


def test_dora_trains_beside_a_packed_embedding_which_peft_does_not_read(attach):
    model = attach(quantization={"data_type": "none", "embeddings": "int2"}, use_dora=True)
    assert "default" in layer(model).lora_magnitude_vector


@pytest.mark.parametrize(("quantization", "width"), [({"data_type": "int8"}, 64), ({"data_type": "nf4"}, 80)])
def test_dora_is_refused_where_peft_would_misread_the_base_also_from_a_folder(
    attach, make_recipe, tmp_path, quantization, width
):
    folder = write_tiny_model(tmp_path / "model", hidden_size=width, intermediate_size=2 * width)
    plain = make_recipe(
        model={"name_or_path": str(folder)}, quantization={"data_type": "none"}, adapter={"use_dora": True}
    )
    save_adapter(attach_adapter(load_base(plain, CPU), plain.adapter), tmp_path / "dora", Owner(str(folder)))
    quantised = make_recipe(model={"name_or_path": str(folder)}, quantization=quantization)
    with pytest.raises(UserError, match=r"DoRA dequantises the base by itself, and would read .* wrongly") as error:
        load_adapter(load_base(quantised, CPU), tmp_path / "dora")
    assert error.value.code == Exit.REFUSED


def test_a_continued_adapter_keeps_every_bit_of_its_fp32_file(attach, make_recipe, tmp_path):
    """PEFT loads modules_to_save into copies in the base's dtype: bf16 here."""
    model = attach(quantization={"compute_dtype": "bfloat16"}, modules_to_save=["lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", Owner("base"))
    recipe = make_recipe(adapter={"from": str(tmp_path / "adapter")}, quantization={"compute_dtype": "bfloat16"})
    got = peft.get_peft_model_state_dict(attach_adapter(load_base(recipe, CPU), recipe.adapter))
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(got[name], tensor), name


def check_refused(folder: Path, make_recipe, message: str, code: Exit = Exit.USAGE) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_adapter(load_base(make_recipe(), CPU), folder)
    assert error.value.code == code


def test_a_missing_folder_is_refused(make_recipe, tmp_path):
    check_refused(tmp_path / "none", make_recipe, "no such adapter folder")


def test_another_kind_of_adapter_is_refused(saved, make_recipe):
    (saved / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    check_refused(saved, make_recipe, "not a LoRA adapter")


def test_a_pickled_adapter_is_refused(saved, make_recipe):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    check_refused(saved, make_recipe, "pickle, which can run code", Exit.REFUSED)


def test_an_adapter_without_weights_is_refused(saved, make_recipe):
    (saved / "adapter_model.safetensors").unlink()
    check_refused(saved, make_recipe, r"no adapter_model\.safetensors")


def test_a_damaged_adapter_is_refused(saved, make_recipe):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    check_refused(saved, make_recipe, "damaged")


def test_a_missing_tensor_is_an_error_where_peft_only_warns(saved, make_recipe):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    dropped = sorted(tensors)[0]
    del tensors[dropped]
    save_file(tensors, path)
    check_refused(saved, make_recipe, rf"1 tensors do not match the base, such as {dropped}")


def test_an_adapter_of_another_base_is_refused(saved, make_recipe, tmp_path):
    folder = write_tiny_model(tmp_path / "wide", hidden_size=128)
    recipe = make_recipe(model={"name_or_path": str(folder)})
    with pytest.raises(UserError, match="the adapter does not fit this base"):
        load_adapter(load_base(recipe, CPU), saved)
