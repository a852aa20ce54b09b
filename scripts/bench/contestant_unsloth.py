"""Unsloth, from its public interface: FastLanguageModel and TRL's trainer, which it patches.

Never run here: Unsloth needs an NVIDIA GPU, and this was written from its documentation.
"""

from __future__ import annotations

import unsloth  # type: ignore[import-not-found]  # before transformers and TRL, which it patches

# isort: split
from cases import Case
from channel import Channel
from contestant_trl import train

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(case: Case, channel: Channel) -> None:
    """Matched settings; where the case recomputes, by Unsloth's own way of it, which keeps activations on the host."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(case.model), max_seq_length=case.length, load_in_4bit=True, local_files_only=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        target_modules=LINEAR,
        bias="none",
        use_gradient_checkpointing="unsloth" if case.recompute else False,
        random_state=case.seed,
    )
    settings = {
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "train_sampling_strategy": "sequential",
    }
    train(case, channel, model, settings, None)
