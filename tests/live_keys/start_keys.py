"""The keys of a start that changes the base: seen on the live model."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_cli.quant.linear import PackedLinear
from qlora_cli.recipe import Recipe
from tests.live_keys.bench import Bench, Live, becomes
from tests.live_keys.model_keys import layer

LOFTQ = {"adapter.init": "loftq"}


def published(bench: Bench, name: str) -> Tensor:
    """The unquantised weight (out, in) of a projection of the first layer."""
    return load_file(bench.places["model"] / "model.safetensors")[f"model.layers.0.self_attn.{name}.weight"]


def factors(module: Any) -> tuple[Tensor, Tensor]:
    """A and B of an adapted layer."""
    return module.lora_A.default.weight.detach(), module.lora_B.default.weight.detach()


def lost(bench: Bench, recipe: Recipe, name: str) -> Tensor:
    """(out, in): what base and adapter together lack of a projection's weight."""
    module = layer(bench, recipe, name)
    return published(bench, name) - module.base_layer.dequantized() - module.get_delta_weight("default").detach()


def kind_of_start(bench: Bench, recipe: Recipe) -> str:
    """What the query's adapter begins with, told by what is true of that alone."""
    module, weight = layer(bench, recipe), published(bench, "q_proj")
    a, b = factors(module)
    if not b.any():
        return "default"
    if torch.allclose(b.T @ b, torch.eye(b.shape[1]), atol=1e-4):
        return "olora"
    added = torch.linalg.svdvals(module.get_delta_weight("default").detach())[: len(a)]
    if torch.allclose(added, torch.linalg.svdvals(weight)[: len(a)], rtol=0.03):
        return "pissa"
    plain = PackedLinear(*weight.shape[::-1], bias=False, storage=module.base_layer.storage)
    plain.store(plain.packed_from(weight))
    better = lost(bench, recipe, "q_proj").norm() < 0.95 * (weight - plain.dequantized()).norm()
    return "loftq" if better else "unknown"


def iterations(bench: Bench, recipe: Recipe) -> int:
    """How far the alternation went: each goes on lowering the error of these weights, so the last one is kept."""
    return max(line["iteration"] for line in bench.table(recipe))


def quantised_last(bench: Bench, recipe: Recipe) -> bool:
    """Whether the base is the quantised rest of what the adapter adds, but for codes on an edge."""
    module = layer(bench, recipe)
    rest = published(bench, "q_proj") - module.get_delta_weight("default").detach()
    same = module.base_layer.packed_from(rest).codes == module.base_layer.packed.codes
    return bool(same.float().mean() > 0.99)


def error_in_outputs(bench: Bench, recipe: Recipe) -> float:
    """Of the first layer's output projection over the training rows: ‖(W - Q - s B A) X‖ / ‖W X‖."""
    plain = bench.prepared(bench.recipe({"quantization.data_type": "none"}))
    seen: list[Tensor] = []
    handle = layer(bench, plain.recipe, "o_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in plain.feed.examples.rows:
            plain.base.model(torch.tensor([list(row.input_ids)]))
    handle.remove()
    x = torch.cat(seen).T
    return float((lost(bench, recipe, "o_proj") @ x).norm() / (published(bench, "o_proj") @ x).norm())


START = [
    *(Live("adapter.init", name, kind_of_start, becomes("default", name)) for name in ("loftq", "pissa", "olora")),
    Live("adapter.loftq.iterations", 2, iterations, becomes(5, 2), LOFTQ),
    Live("adapter.loftq.order", "svd_first", quantised_last, becomes(False, True), LOFTQ),
    Live(
        "adapter.loftq.calibration",
        12,
        error_in_outputs,
        lambda without, with_value: with_value < 0.9 * without,
        LOFTQ,
    ),
]
