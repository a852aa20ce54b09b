"""Small random models of each kind beside the tiny Llama, as folders: encoders, encoder-decoders, decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tiny import tiny_tokenizer

COMMON = {"vocab_size": 259, "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 2}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 72,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 16,
    "max_relative_positions": 64,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 64,
    "pooler_dropout": 0.0,
}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "scale_embedding": True,
    "init_std": 0.1,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "initializer_factor": 0.5,
}
T5 |= {"decoder_start_token_id": 0}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": None}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "pad_token_id": None,
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "deberta": ("DebertaV2Model", ENCODER | DEBERTA),
    "bart": ("BartForConditionalGeneration", BART),
    "t5": ("T5ForConditionalGeneration", T5),
    "gated_t5": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
}
"""The class and the config of each as its makers publish it, before a task is chosen."""

READING = ("sequence_classification", "question_answering")
TASKS_OF: dict[str, tuple[str, ...]] = {
    "bert": READING,
    "roberta": READING,
    "deberta": READING,
    "bart": ("seq2seq_lm", *READING),
    "t5": ("seq2seq_lm", *READING),
    "gated_t5": ("seq2seq_lm", *READING),
    "gpt2": ("causal_lm", *READING),
    "llama": ("causal_lm", *READING),
}
"""What each can do from its published checkpoint."""

PAIRS = [(name, task) for name, tasks in TASKS_OF.items() for task in tasks]


def write_architecture(folder: Path, name: str, **changes: Any) -> Path:
    """A folder with a model of random weights drawn from seed 0, and a byte-level tokenizer."""
    class_name, config = PUBLISHED[name]
    kind = getattr(transformers, class_name)
    settings: dict[str, Any] = {**COMMON, **config, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**settings))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows_of(task: str, count: int = 4, length: int = 20) -> dict[str, Tensor]:
    """A padded batch for a task: token ids, mask and labels, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 259, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(count):
        ids[row, length - row - 1], ids[row, length - row :], mask[row, length - row :] = 2, 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | TARGETS[task](ids, mask)


def tokens(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The input again."""
    return {"labels": ids.masked_fill(mask == 0, -100)}


def classes(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Three classes by turns."""
    return {"labels": torch.arange(len(ids)) % 3}


def spans(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """From the row's number to three tokens on."""
    return {"start_positions": torch.arange(len(ids)), "end_positions": torch.arange(len(ids)) + 3}


TARGETS: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "causal_lm": tokens,
    "seq2seq_lm": tokens,
    "sequence_classification": classes,
    "question_answering": spans,
}


def model_section(folder: Path, task: str, **more: Any) -> dict[str, Any]:
    """The section `model` of a recipe on a folder, with three classes where the task has any."""
    labels = {"labels": ["no", "perhaps", "yes"]} if task == "sequence_classification" else {}
    return {"name_or_path": str(folder), "task": task, **labels, **more}


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Every logit of a batch: of tokens, of classes, or of the first and the last token of spans."""
    found = model.eval()(**batch)
    return torch.stack([found.start_logits, found.end_logits]) if "start_logits" in found else found.logits


def shift_adapter(model: Any) -> None:
    """Moves every trainable tensor away from where it is, the same way at every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
