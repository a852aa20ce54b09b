"""Tiny random models, plain PEFT adapters with a nonzero B, and the unmerged model they are compared with."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from qlora_cli.merge.difference import seen
from qlora_cli.recipe.schema import Quantization

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [list(range(3, 40)), [7, 9, 200, 31, 5], list(range(255, 190, -1))]

ADAPTERS: dict[str, dict] = {
    "default": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8, r".*\.0\..*up_proj": 3},
        "alpha_pattern": {"k_proj": 3, r"model.layers.[01].self_attn.q_proj": 11},
    },
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def llama(**changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | changes)))


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, initializer_range=0.2)
    )


def save_adapter(base: Path, folder: Path, targets=LINEAR, **settings) -> Path:
    """A plain PEFT adapter of rank 4, alpha 6, with every trainable tensor moved away from its start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "magnitude" in name else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def storage(data_type="nf4", double_quant=True):
    return Quantization(data_type=data_type, double_quant=double_quant)


def unmerged(base: Path, adapter: Path | None, data_type: str, dtype: torch.dtype, double_quant=True):
    """The model as trained: bitsandbytes base by plain transformers, adapter by plain PEFT, in eval mode."""
    skip = {"llm_int8_skip_modules": ["lm_head"]}
    config = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
        },
        "fp4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }
    chosen = BitsAndBytesConfig(**config[data_type], **skip) if data_type != "none" else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=chosen)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def quantized_modules(model) -> list[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [
        name.replace(".base_layer", "").removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]


def next_tokens(model, row):
    """The logits behind every token of a row of ids, and its loss."""
    ids = torch.tensor([row])
    logits = model(input_ids=ids).logits[0]
    return logits, torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum"), len(row) - 1


def logits_of(model, rows):
    """The logits behind every token of each row."""
    return seen(model, rows, next_tokens, 1 << 30).logits
