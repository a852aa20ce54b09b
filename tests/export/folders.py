"""Small folders to export: an adapter as PEFT writes it, and a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_tokenizer


def write_adapter(folder: Path, base: Path, **changes: Any) -> Path:
    """A random LoRA adapter of rank 4 for a base, by PEFT itself; `changes` are then made to its config."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapter.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)} | changes
    path.write_text(json.dumps(config))
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\nlibrary_name: peft\n---\n\n# A LoRA adapter for {base}\n\n"
        "Trained on /home/somebody/rows.jsonl"
        ", see https://example.org/a/b.\n"
    )
    return folder
