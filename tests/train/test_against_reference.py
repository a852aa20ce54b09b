"""Training against a loop written here in plain torch, PEFT and bitsandbytes, with no code of ours."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_cli import commands
from qlora_cli.display import QuietReport

STEPS, ROWS_PER_STEP, LEARNING_RATE, SEED = 20, 4, 5e-3, 7


def reference(model_folder: Path, rows_file: Path, order: list[list[int]]) -> tuple[list[float], dict, dict]:
    """Losses of every step, the adapter at the start and at the end. One row per forward pass: no padding at all."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config, dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    start = {name: t.clone() for name, t in peft.get_peft_model_state_dict(model).items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    losses = []
    for step in range(STEPS):
        loss, tokens = torch.zeros(()), 0
        for index in order[step]:
            user, assistant = (message["content"] for message in rows[index])
            prompt = tokenizer.encode(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
            answer = tokenizer.encode(f"{assistant}<|im_end|>")
            logits = model(torch.tensor([prompt + answer])).logits[0]
            for position, token in enumerate(answer, start=len(prompt)):
                loss = loss - logits[position - 1].log_softmax(-1)[token]
                tokens += 1
        loss = loss / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, start, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_twenty_steps_equal_the_reference(make_recipe, tiny_model, rows_file, checkpointing):
    from qlora_cli.data.order import Order

    order = [window.rows for window in Order(((12, 1.0),), ROWS_PER_STEP, SEED).windows(STEPS)]
    losses, start, expected = reference(tiny_model, rows_file, order)
    recipe = make_recipe(
        training={
            "max_steps": STEPS,
            "lr_scheduler": "constant",
            "warmup_ratio": 0.0,
            "learning_rate": LEARNING_RATE,
            "gradient_checkpointing": checkpointing,
        }
    )
    adapter = commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
    ours = [json.loads(line) for line in (adapter.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=1e-4)
    got = load_file(adapter / "adapter_model.safetensors")
    assert got.keys() == expected.keys()
    difference = torch.cat([(got[name] - expected[name]).flatten() for name in expected]).norm()
    update = torch.cat([(expected[name] - start[name]).flatten() for name in expected]).norm()
    assert difference / update <= 1e-4, f"relative difference {difference / update:.2e}"
    print(f"adapter difference / update {difference / update:.2e}")
    assert losses[-1] < losses[0] / 2, "the reference learned nothing, so the comparison would prove nothing"
