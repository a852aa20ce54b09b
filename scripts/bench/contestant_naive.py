"""The plain stack: transformers, bitsandbytes and PEFT as PEFT's guide to quantisation has it, in a loop of one screen.

As the guide has it, `prepare_model_for_kbit_training` casts the head to float32, and it and the adapters multiply in
that. `autocast` has the forward pass under bfloat16 autocast, as the Trainer's `bf16=True` would.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import peft
import torch
from cases import Case
from channel import Channel, seen_in
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantization(case: Case) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as in the QLoRA paper."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, case.compute),
    )


def load(case: Case) -> Any:
    """The quantised base on the GPU, or on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        str(case.model),
        quantization_config=quantization(case),
        dtype=getattr(torch, case.compute),
        device_map={"": device},
    )


def adapter(**changed: Any) -> peft.LoraConfig:
    """r 16, alpha 32, no dropout, on all linear layers."""
    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return peft.LoraConfig(**settings | changed, bias="none", task_type="CAUSAL_LM")


def batch_of(rows: list[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """The rows padded on the right to the longest: input_ids, labels and attention_mask, (B, T) int64."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows], device=device)

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask, device=device),
    }


def plain(case: Case, channel: Channel) -> None:
    """As the guide has it."""
    train(case, channel, nullcontext())


def autocast(case: Case, channel: Channel) -> None:
    """In the case's dtype where autocast may."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(case, channel, torch.autocast(device, dtype=getattr(torch, case.compute)))


def train(case: Case, channel: Channel, forward: AbstractContextManager[Any]) -> None:
    """Trains in the rows' order, again and again. forward: the context of every forward pass."""
    torch.manual_seed(case.seed)
    base = load(case)
    channel.weights_loaded()
    kwargs = {"use_reentrant": False}
    base = peft.prepare_model_for_kbit_training(base, case.recompute, gradient_checkpointing_kwargs=kwargs)
    model = peft.get_peft_model(base, adapter())
    model.config.use_cache = False
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0, fused=True)
    rows, size = case.read_rows(), case.rows_per_step
    portions = [rows[at : at + size] for at in range(0, len(rows), size)]
    channel.facts["steps_of_pass"] = [len(portions)] * case.total_steps
    for portion in cycle(portions):
        channel.wait()
        batch = batch_of(portion, base.device)
        with forward:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        channel.record(loss.detach(), partial(seen_in, **batch))
