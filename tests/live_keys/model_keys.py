"""The keys of model, quantization and adapter: seen on the live model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.errors import UserError
from qlora_cli.quant.embedding import PackedEmbedding
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.recipe import Recipe
from tests.live_keys.bench import Bench, Live, becomes

ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
HUB = {"model.name_or_path": "someone/model"}
ROUGH = {"quantization.data_type": "int8"}
UNIFORM = {"quantization.data_type": "int4"}
FRESH = {"adapter.r": 16, "adapter.alpha": 32}  # the defaults, beside which `from` is legal


def added_rows(bench: Bench, recipe: Recipe) -> list[int]:
    """The ids of the tokens whose rows are trained, in the embedding and in the head alike."""
    model = bench.prepared(recipe).base.model
    rows = [
        getattr(one, "token_adapter", None) for one in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    first, second = ([] if one is None else [*one.token_indices["default"]] for one in rows)
    assert first == second
    return first


def layer(bench: Bench, recipe: Recipe, name: str = "q_proj") -> Any:
    """The adapted projection of the first layer."""
    return getattr(bench.prepared(recipe).base.model.model.layers[0].self_attn, name)


def config(name: str) -> Any:
    return lambda bench, recipe: getattr(bench.prepared(recipe).base.model.config, name)


def asked_of_the_hub(bench: Bench, recipe: Recipe) -> tuple[str, str | None, bool]:
    """Id, revision, and whether Python files are asked for; the hub is played by a recorder."""
    calls: list[tuple[str, str | None, bool]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, "*.py" in allow_patterns))
        return str(bench.places["model"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        bench.prepare_anew(recipe)
    (call,) = set(calls)  # for the tokenizer, then for the weights
    return call


def class_loaded(bench: Bench, recipe: Recipe) -> str:
    """The class of the base, or refused. The model's own modules are copied to the bench, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(bench.root / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        try:
            return type(bench.prepare_anew(recipe).base.model).__name__
        except UserError as error:
            return "refused" if "Python code that comes with it" in str(error) else str(error)


def storage(bench: Bench, recipe: Recipe) -> str:
    """How the first projection's weights are stored."""
    module = layer(bench, recipe).base_layer
    if isinstance(module, PackedLinear):
        return module.storage.data_type
    kinds = {"Linear8bitLt": "int8", "Linear": str(module.weight.dtype)}
    return kinds.get(type(module).__name__) or module.weight.quant_state.quant_type


def of_q_and_v(bench: Bench, recipe: Recipe) -> list[str]:
    """How the query's and the value's projection are stored."""
    modules = [layer(bench, recipe, name).base_layer for name in ("q_proj", "v_proj")]
    return [m.storage.data_type if isinstance(m, PackedLinear) else m.weight.quant_state.quant_type for m in modules]


def of_the_embedding(bench: Bench, recipe: Recipe) -> str:
    """How the input embedding is stored."""
    embedding = bench.prepared(recipe).base.model.get_input_embeddings()
    return embedding.storage.data_type if isinstance(embedding, PackedEmbedding) else str(embedding.weight.dtype)


def num_scales(bench: Bench, recipe: Recipe) -> int:
    return len(layer(bench, recipe).base_layer.scales)


def has_zero_points(bench: Bench, recipe: Recipe) -> bool:
    return layer(bench, recipe).base_layer.zeros is not None


def num_levels(bench: Bench, recipe: Recipe) -> int:
    """Different magnitudes and signs of the first block, in units of its scale."""
    return len(layer(bench, recipe).base_layer.dequantized().view(-1, 64)[0].unique())


def error_of_storage(bench: Bench, recipe: Recipe) -> float:
    """Relative L2 distance of the stored projection from the unquantised one."""
    exact = layer(bench, bench.recipe({"quantization.data_type": "none"})).base_layer.weight.detach()
    return float((layer(bench, recipe).base_layer.dequantized() - exact).norm() / exact.norm())


def scales_are_quantised(bench: Bench, recipe: Recipe) -> bool:
    return layer(bench, recipe).base_layer.weight.quant_state.nested


def logits(bench: Bench, recipe: Recipe) -> Tensor:
    """As in an evaluation: in training on a CPU, bitsandbytes does not quantise the activations of int8 layers."""
    session = bench.prepared(recipe)
    with torch.no_grad(), session.base.compute():
        found = session.model.eval()(torch.arange(3, 67, device=session.base.device)[None]).logits
    session.model.train()
    return found


def dtypes(bench: Bench, recipe: Recipe) -> list[torch.dtype]:
    """Of the activations and of the weights that are not quantised."""
    embedding = bench.prepared(recipe).base.model.get_input_embeddings()
    return [logits(bench, recipe).dtype, embedding.weight.dtype]


def error_of_quantisation(bench: Bench, recipe: Recipe) -> float:
    """Relative L2 distance of the logits from those of the unquantised base."""
    exact = logits(bench, bench.recipe({"quantization.data_type": "none"}))
    return ((logits(bench, recipe) - exact).norm() / exact.norm()).item()


def quantised(bench: Bench, recipe: Recipe) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in quantized_modules(bench.prepared(recipe).base.model)})


def adapted(bench: Bench, recipe: Recipe) -> list[str]:
    """The last names of the modules with an adapter."""
    return sorted({name.rsplit(".", 1)[-1] for name in adapted_in_full(bench, recipe)})


def adapted_in_full(bench: Bench, recipe: Recipe) -> list[str]:
    return [name for name, module in bench.prepared(recipe).model.named_modules() if hasattr(module, "lora_A")]


def adapted_layers(bench: Bench, recipe: Recipe) -> set[str]:
    return {name.split(".layers.")[1].split(".")[0] for name in adapted_in_full(bench, recipe)}


def ranks(bench: Bench, recipe: Recipe) -> list[int]:
    """The ranks of the query's and the value's A and B."""
    modules = [layer(bench, recipe, name) for name in ("q_proj", "v_proj")]
    return [size for m in modules for size in (m.lora_A.default.weight.shape[0], m.lora_B.default.weight.shape[1])]


def scaling(bench: Bench, recipe: Recipe) -> list[float]:
    """By what the query's and the value's layers multiply B A x: measured, with A and B set to corners of identity."""
    found = []
    for name in ("q_proj", "v_proj"):
        module = layer(bench, recipe, name)
        a, b = module.lora_A.default.weight, module.lora_B.default.weight
        x = torch.ones(1, 1, a.shape[1], device=a.device)
        with torch.no_grad():
            kept = a.clone(), b.clone()
            before = module(x)
            a.copy_(torch.eye(*a.shape)), b.copy_(torch.eye(*b.shape))
            found.append(round((module(x) - before)[0, 0, 0].item(), 4))
            a.copy_(kept[0]), b.copy_(kept[1])
    return found


def share_dropped(bench: Bench, recipe: Recipe) -> float:
    """The share of a million input features that the adapter drops in training."""
    dropped = layer(bench, recipe).lora_dropout.default(torch.ones(1_000_000)) == 0
    return round(dropped.float().mean().item(), 2)


def largest_of_a(bench: Bench, recipe: Recipe) -> float:
    return layer(bench, recipe).lora_A.default.weight.abs().max().item()


def trainable_magnitudes(bench: Bench, recipe: Recipe) -> int:
    """DoRA's trained magnitudes of the query's projection: one per output feature."""
    named = layer(bench, recipe).named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "magnitude" in name)


def lm_head_is_trained(bench: Bench, recipe: Recipe) -> bool:
    """Whether the head has moved after the run."""
    from safetensors.torch import load_file

    saved = load_file(bench.trained(recipe).folder / "adapter" / "adapter_model.safetensors")
    head = load_file(bench.places["model"] / "model.safetensors")["lm_head.weight"]
    return any("lm_head" in name and not tensor.equal(head) for name, tensor in saved.items())


def tensors_of_the_old_adapter(bench: Bench, recipe: Recipe) -> int:
    """How many tensors of the adapter folder are in the live model, bit for bit and trainable."""
    from safetensors.torch import load_file

    live: dict[str, nn.Parameter] = dict(bench.prepared(recipe).model.named_parameters())
    saved = load_file(bench.places["adapter"] / "adapter_model.safetensors")
    pairs = [(live.get(name.replace(".weight", ".default.weight")), tensor) for name, tensor in saved.items()]
    return sum(p is not None and p.requires_grad and p.data.cpu().equal(tensor) for p, tensor in pairs)


BOUND = 1 / 8
"""Kaiming-uniform A over 64 input features stays below 1 / sqrt(64)."""

MODEL = [
    Live("model.name_or_path", "$narrow", config("hidden_size"), becomes(64, 32)),
    Live(
        "model.revision",
        "v2",
        asked_of_the_hub,
        becomes(("someone/model", None, False), ("someone/model", "v2", False)),
        HUB,
    ),
    Live("model.added_tokens", ["<think>", "na"], added_rows, becomes([], [259, 260])),
    Live("model.attn_implementation", "eager", config("_attn_implementation"), becomes("sdpa", "eager")),
    Live(
        "model.trust_remote_code",
        True,
        class_loaded,
        becomes("refused", "OwnForCausalLM"),
        {"model.name_or_path": "$own"},
    ),
    Live(
        "model.trust_remote_code",
        True,
        asked_of_the_hub,
        becomes(("someone/model", None, False), ("someone/model", None, True)),
        HUB,
    ),
]

QUANTIZATION = [
    Live("quantization.data_type", "fp4", storage, becomes("nf4", "fp4")),
    Live("quantization.data_type", "int8", storage, becomes("nf4", "int8")),
    Live("quantization.data_type", "none", storage, becomes("nf4", "torch.float32")),
    *(Live("quantization.data_type", kind, storage, becomes("nf4", kind)) for kind in ("int4", "nf2", "int2")),
    *(
        Live("quantization.block_size", size, num_scales, becomes(64, 4096 // size), {"quantization.data_type": "nf2"})
        for size in (32, 128)
    ),
    Live("quantization.overrides", {"*.q_proj": "int2", "*": "nf4"}, of_q_and_v, becomes(["nf4"] * 2, ["int2", "nf4"])),
    *(
        Live("quantization.embeddings", kind, of_the_embedding, becomes("torch.float32", kind))
        for kind in ("nf4", "fp4", "int4", "nf2", "int2")
    ),
    Live("quantization.zero_point", True, has_zero_points, becomes(False, True), UNIFORM),
    *(
        Live("quantization.clip", clip, error_of_storage, lambda best, clipped: best < clipped < 1, UNIFORM)
        for clip in ("absmax", "percentile", "2sigma")
    ),
    Live("quantization.clip", "search", num_levels, becomes(4, 3), {"quantization.data_type": "int2"}),
    Live("quantization.double_quant", False, scales_are_quantised, becomes(True, False)),
    Live("quantization.compute_dtype", "bfloat16", dtypes, becomes([torch.float32] * 2, [torch.bfloat16] * 2)),
    Live(
        "quantization.skip_modules",
        ["lm_head", "v_proj"],
        quantised,
        becomes(ALL_LINEAR, [name for name in ALL_LINEAR if name != "v_proj"]),
    ),
    # the head too is quantised where nothing is skipped; the empty list is a legal value
    Live("quantization.skip_modules", [], quantised, becomes(ALL_LINEAR, sorted([*ALL_LINEAR, "lm_head"]))),
    Live(
        "quantization.outlier_threshold",
        0.5,
        error_of_quantisation,
        lambda without, with_value: 0 < with_value < 0.8 * without,
        ROUGH,
    ),
]

ADAPTER = [
    Live("adapter.r", 8, ranks, becomes([4] * 4, [8] * 4)),
    Live("adapter.alpha", 12, scaling, becomes([2.0, 2.0], [3.0, 3.0])),
    Live("adapter.dropout", 0.25, share_dropped, becomes(0.0, 0.25)),
    Live("adapter.target_modules", ["q_proj", "up_proj"], adapted, becomes(ALL_LINEAR, ["q_proj", "up_proj"])),
    Live("adapter.target_modules", r".*\.[kv]_proj", adapted, becomes(ALL_LINEAR, ["k_proj", "v_proj"])),
    Live("adapter.layers", [1], adapted_layers, becomes({"0", "1"}, {"1"})),
    Live("adapter.init", "gaussian", largest_of_a, lambda without, with_value: without <= BOUND < with_value / 2),
    Live("adapter.use_rslora", True, scaling, becomes([2.0, 2.0], [4.0, 4.0])),
    Live("adapter.use_dora", True, trainable_magnitudes, becomes(0, 64)),
    Live("adapter.modules_to_save", ["lm_head"], lm_head_is_trained, becomes(False, True)),
    Live("adapter.rank_pattern", {"v_proj": 2}, ranks, becomes([4] * 4, [4, 4, 2, 2])),
    Live("adapter.alpha_pattern", {"v_proj": 2}, scaling, becomes([2.0, 2.0], [2.0, 0.5])),
    Live("adapter.from", "$adapter", tensors_of_the_old_adapter, becomes(0, 28), FRESH),
]
