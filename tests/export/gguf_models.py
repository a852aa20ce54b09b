"""Tiny random models of every architecture that GGUF has, with the tokenizers and settings that such models come with.

Used by the tests and by scripts/verify_gguf.py, which runs them in llama.cpp itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_cli.export import gguf_pretokenizers as cuts

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart/base"
CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(regex: str | None, *, ignore_merges: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """The quickstart's vocabulary with another cut; None: GPT-2's."""
    layout = json.loads((QUICKSTART / "tokenizer.json").read_text())
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex is None}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    steps = [bytes_only] if regex is None else [split, bytes_only]
    layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    layout["model"]["ignore_merges"] = ignore_merges
    layout["normalizer"] = {"type": "NFC"} if nfc else None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = (QUICKSTART / "chat_template.jinja").read_text()
    return tokenizer


DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def _merges(texts: list[str], known: set[str]) -> list[tuple[str, str]]:
    """Every pair of known tokens that makes one of the texts."""
    pairs = ((text[:at], text[at:]) for text in texts for at in range(1, len(text)))
    return [pair for pair in pairs if known.issuperset(pair)]


def sentencepiece(prefix: str) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE of bytes, letters and words; prefix: legacy (Llama 2), first (Mistral), never (Gemma)."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    spaced = ["the", "and", "a", "in", "of", "to", "is", "day", "Hello", "world"]
    words = [*spaced, "ing", "er", "ed", "on", "an", "at", "he", "12", "▁▁", "▁▁▁▁", *(f"▁{word}" for word in spaced)]
    letters = [chr(code) for code in range(33, 127)] + ["▁", *"éü你\n"]
    vocab = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    grown = sorted({word[:end] for word in words for end in range(2, len(word) + 1)}, key=lambda t: (len(t), t))
    vocab = list(dict.fromkeys([*vocab, *grown]))
    layout: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t, "special": i < 3 or t != "<|end|>"}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, t in enumerate(special)
        ],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: index for index, text in enumerate(vocab)},
            "merges": _merges(grown, set(vocab)),
        },
        "post_processor": None,
        "decoder": DECODER,
    } | _spaces(prefix)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _spaces(prefix: str) -> dict[str, Any]:
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": False}
    return {
        "legacy": {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, escape]},
            "pre_tokenizer": None,
        },
        "first": {"normalizer": None, "pre_tokenizer": metaspace},
        "never": {"normalizer": escape, "pre_tokenizer": None},
    }[prefix]


@dataclass(frozen=True)
class Case:
    """One tiny model: transformers' model type, its tokenizer, and what its config has besides the sizes."""

    model_type: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    config: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3_ROPE = {
    "full_attention": _rope("linear", factor=4.0) | {"rope_theta": 100000.0},
    "sliding_attention": _rope("default"),
}

CASES: dict[str, Case] = {
    "llama-3": Case(
        "llama",
        lambda: byte_level(cuts.LLAMA3, ignore_merges=True),
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-2": Case("llama", lambda: sentencepiece("legacy"), {"rope_parameters": _rope("linear", factor=2.0)}),
    "llama-yarn": Case(
        "llama",
        lambda: byte_level(None),
        {
            "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3),
            "tie_word_embeddings": True,
        },
    ),
    "mistral": Case("mistral", lambda: sentencepiece("first"), {"head_dim": 32, "sliding_window": None}),
    "mistral-nemo": Case("mistral", lambda: byte_level(cuts.TEKKEN, ignore_merges=True), {"sliding_window": None}),
    "qwen2": Case("qwen2", lambda: byte_level(cuts.QWEN2, nfc=True), {"tie_word_embeddings": True}),
    "qwen3": Case(
        "qwen3",
        lambda: byte_level(cuts.QWEN2),
        {"head_dim": 32, "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "gemma": Case("gemma", lambda: sentencepiece("never"), {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Case("gemma2", lambda: sentencepiece("never"), GEMMA | {"tie_word_embeddings": True}),
    "gemma3": Case(
        "gemma3_text",
        lambda: sentencepiece("never"),
        GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
}


def make_model(name: str, hidden_size: int = 64) -> Any:
    """A random model of a case in float32, drawn from seed 0, norms and biases too."""
    case = CASES[name]
    tokenizer = case.tokenizer()
    settings = {
        "vocab_size": len(tokenizer) + 8,  # rows without a token, as published models have
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    config = transformers.AutoConfig.for_model(case.model_type, **(settings | case.config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                assert parameter.isfinite().all(), parameter_name
    return model


def write_model(name: str, folder: Path, hidden_size: int = 64) -> Path:
    """A case as a folder with its tokenizer."""
    make_model(name, hidden_size).save_pretrained(folder)
    CASES[name].tokenizer().save_pretrained(folder)
    return folder


def write_lora(name: str, folder: Path, **settings: Any) -> Any:
    """A random LoRA adapter on all linear layers of a case; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = make_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(**(usual | settings))).eval()
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if ".lora_B." in parameter_name:
                    parameter.normal_(std=0.1)
    peft.save_pretrained(folder)
    return peft
