"""What llama.cpp can run: one table of architectures, their keys in a GGUF file, and what each cannot express.

After llama.cpp's converter (conversion/{base,llama,qwen,gemma}.py) and its loader (src/models/*.cpp) as packed in
llama-cpp-python 0.3.36: the loader ignores some keys of a config.json silently; such a model is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.model.source import read_json

Fields = dict[str, Any]
"""Keys of a GGUF file: int is stored as uint32, float as float32, then bool, str, and lists of one of them."""

QKV = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs one class of transformers.

    name:         llama.cpp's own.
    activations:  `hidden_act` that its graph computes.
    biases:       tensors of a block that may have a bias there.
    permuted:     rows of q and k lie as the original LLaMA's, pairs of a rotation beside each other.
    norm_shift:   added to norms: transformers multiplies by 1 + weight.
    head_is_embedding: an output tensor of its own is unknown there.
    square_heads: heads * head_dim has to be hidden_size.
    scale_by:     layers of the one size whose attention is scaled by hidden_size / heads instead of head_dim.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    biases: frozenset[str] = frozenset()
    permuted: bool = False
    norm_shift: float = 0.0
    head_is_embedding: bool = False
    square_heads: bool = False
    scale_by: int = 0


LLAMA = Architecture(
    "llama", biases=QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}, permuted=True, norm_shift=0.0
)
GELU = ("gelu_pytorch_tanh",)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", biases=QKV, square_heads=True),
    "Qwen3ForCausalLM": Architecture("qwen3", biases=QKV),
    "GemmaForCausalLM": Architecture("gemma", GELU, norm_shift=1.0, head_is_embedding=True),
    "Gemma2ForCausalLM": Architecture("gemma2", GELU, norm_shift=1.0, head_is_embedding=True, scale_by=46),
    "Gemma3ForCausalLM": Architecture("gemma3", GELU, norm_shift=1.0, scale_by=62),
}
"""By the class that config.json names."""

WHOLE = "export it for vLLM or load it with transformers"


def architecture_of(folder: Path) -> Architecture:
    """The table's entry of a model folder. Raises UserError for a class that is not in it."""
    path = folder / "config.json"
    config = read_json(path, "it says what the model is")
    named = (config.get("architectures") or [None])[0]
    if named not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        what = f"GGUF is not available for {named or 'a config.json without architectures'} (it is for {known})"
        raise UserError(path, what, WHOLE)
    if config.get("quantization_config"):
        raise UserError(path, "its weights are stored quantised", "merge without --quantize and export that folder")
    return ARCHITECTURES[named]


def load_config(folder: Path) -> Any:
    """transformers' config with its defaults. Raises UserError for one that it cannot read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(folder / "config.json", f"cannot be read: {reason}", "restore the file") from error


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def check_config(folder: Path, arch: Architecture, config: Any) -> None:
    """Raises UserError for a setting that llama.cpp would ignore: the file would load there and answer otherwise."""

    def refuse(key: str, value: object, runs: str) -> None:
        raise UserError(folder / "config.json", f"{key} is {value!r}, and llama.cpp's {arch.name} {runs}", WHOLE)

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in arch.activations:
        refuse("hidden_act", activation, f"computes {arch.activations[0]}")
    if arch.square_heads and head_dim(config) * config.num_attention_heads != config.hidden_size:
        refuse("head_dim", head_dim(config), "takes hidden_size / num_attention_heads")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    heads = config.num_attention_heads
    runs_by = config.hidden_size // heads if config.num_hidden_layers == arch.scale_by else head_dim(config)
    if arch.scale_by and scalar is not None and scalar != runs_by:
        refuse("query_pre_attn_scalar", scalar, f"scales by {runs_by}")
    if arch.name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        refuse("attn_logit_softcapping", config.attn_logit_softcapping, "has none")
    if getattr(config, "use_bidirectional_attention", None):
        refuse("use_bidirectional_attention", True, "attends to the past alone")
    _layer_types(folder, config)
    _rope_fields(folder, arch, config)


def fields_of(folder: Path, arch: Architecture, config: Any) -> Fields:
    """The hyperparameters of a model."""
    hidden = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim(config),
    }
    hidden |= _rope_fields(folder, arch, config)
    if arch.name in ("gemma2", "gemma3"):
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key, None):
                hidden[key] = float(getattr(config, key))
        sliding = _layer_types(folder, config)
        if any(sliding):
            hidden["attention.sliding_window"] = config.sliding_window
            hidden["attention.sliding_window_pattern"] = sliding
    return {f"{arch.name}.{key}": value for key, value in hidden.items()}


def notes_of(arch: Architecture, config: Any) -> list[str]:
    """What is worth saying: the file is right up to a limit."""
    window = getattr(config, "sliding_window", None)
    if arch.name in ("llama", "qwen2", "qwen3") and window and window < config.max_position_embeddings:
        return [f"llama.cpp attends to the whole context, the model to a window of {window}: answers differ beyond it"]
    return []


def rope_factors(config: Any) -> list[float] | None:
    """Llama 3's divisor of each frequency, (head_dim / 2,), which llama.cpp reads as a tensor; None for other ropes.

    The formula is that of transformers' modeling_rope_utils._compute_llama3_parameters.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_dim(config)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = rope["original_max_position_embeddings"]
    divisors = []
    for at in range(0, size, 2):
        turns = trained / (2 * math.pi * float(rope["rope_theta"]) ** (at / size))  # over the trained context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _layer_types(folder: Path, config: Any) -> list[bool]:
    """Which layers slide, in Gemma 2 and 3. Raises UserError for other kinds of attention."""
    types = list(getattr(config, "layer_types", None) or [])
    if strange := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UserError(folder / "config.json", f"layer_types has {strange[0]!r}, which llama.cpp has not", WHOLE)
    return [kind == "sliding_attention" for kind in types]


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The rope parameters of a kind of layer; transformers 5 keeps old and new spellings in one place."""
    found = dict(config.rope_parameters or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(found.get(layers, found))


def _linear(rope: dict[str, Any]) -> Fields:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}


def _yarn(rope: dict[str, Any]) -> Fields:
    """YaRN. llama.cpp multiplies by 1 + 0.1 ln(factor), transformers' own default, and reads a further factor."""
    factor = float(rope["factor"])
    fields: Fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }
    if rope.get("attention_factor"):
        fields["rope.scaling.attn_factor"] = rope["attention_factor"] / (1 + 0.1 * math.log(factor))
    return fields


ROPES: dict[str, Callable[[dict[str, Any]], Fields]] = {
    "default": lambda rope: {},
    "linear": _linear,
    "llama3": lambda rope: {},  # a tensor: rope_factors
    "yarn": _yarn,
}
"""Kinds of rope by transformers' name."""


def _rope_fields(folder: Path, arch: Architecture, config: Any) -> Fields:
    """The keys of the rope. Raises UserError for one that llama.cpp would not compute."""
    rope, slides = _rope(config), _rope(config, "sliding_attention")
    kind = rope["rope_type"]
    unusual = next((key for key in ("mscale", "mscale_all_dim") if rope.get(key)), None)
    if kind not in ROPES or (kind == "llama3" and arch.name != "llama") or unusual or rope.get("truncate") is False:
        what = f"rope_parameters {rope} are not available in llama.cpp's {arch.name}"
        raise UserError(folder / "config.json", what, WHOLE)
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or (arch.name == "gemma3" and slides["rope_type"] != "default"):
        raise UserError(folder / "config.json", f"llama.cpp's {arch.name} has no {slides or rope}", WHOLE)
    fields = {"rope.freq_base": float(rope["rope_theta"])} | ROPES[kind](rope)
    return fields | ({"rope.freq_base_swa": float(slides["rope_theta"])} if arch.name == "gemma3" else {})
