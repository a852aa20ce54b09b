"""How much memory a model takes when it is run, streamed and whole: `python -m tests.streamed_memory FOLDER`."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from qlora_cli.merge.certificate import Manner
from qlora_cli.merge.place import load_merged
from qlora_cli.model.safetensors_stream import Entry, SafetensorsWriter

WIDTH, FFN, LAYERS, VOCAB = 1024, 2816, 4, 256


def write_model(folder: Path) -> int:
    """A Llama of four layers in float32, written a tensor at a time; its bytes."""
    folder.mkdir()
    LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (WIDTH,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, WIDTH))
    for layer in (f"model.layers.{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (FFN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (WIDTH, FFN)}
        shapes |= {f"{layer}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    entries = [Entry(name, torch.float32, shape) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape) * 0.02)
    return sum(entry.num_bytes for entry in entries)


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: its own, and of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def measured(folder: Path, manner: Manner) -> dict[str, Any]:
    """The most that running a model takes, and logits of it."""
    peak, ended = [0, 0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[:] = map(max, peak, resident())
            time.sleep(0.001)

    before = resident()
    watching = threading.Thread(target=watch)
    watching.start()
    model = load_merged(folder, "causal_lm", torch.float32, manner, torch.device("cpu"))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(16).unsqueeze(0)).logits
    ended.set()
    watching.join()
    own, mapped = (most - least for most, least in zip(peak, before, strict=True))
    return {"own": own, "mapped": mapped, "logits": logits[0, -1, :8].tolist()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    size = write_model(folder / "model")
    measured(folder / "model", "streamed")  # what is imported on the way is no part of it
    found = {manner: measured(folder / "model", manner) for manner in ("streamed", "whole")}
    print(json.dumps({"size": size, **found}))
