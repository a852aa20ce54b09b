"""The shipped recipes of LoftQ's settings have the bits that their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.quant.layers import packed_config
from qlora_cli.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "loftq"
PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.mark.parametrize("bits", [4, 3, 2.5, 2.25, 2])
def test_the_layers_of_llama_2_have_these_bits_on_average(bits):
    recipe = load_recipe(CONFIGS / f"llama2-7b-gsm8k-{bits}bit.yaml")
    config = packed_config(recipe.quantization)
    stored = [config.storage_of(f"model.layers.{at}.{name}") for at in range(32) for name in PROJECTIONS]
    found = [storage.code.bits for storage in stored if storage]
    assert len(found) == 32 * len(PROJECTIONS)
    assert sum(found) / len(found) == bits
    assert found == sorted(found, reverse=True), "the first layers have the more bits"
    assert config.storage_of("lm_head") is None
