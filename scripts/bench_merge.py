"""`qlora merge` beside a plain copy of the base's files and PEFT's merge_and_unload: seconds and peak memory, a table.

    python scripts/bench_merge.py [--gigabytes 2] [--turns 3] [--threads 1] [--json FILE]

A Llama of random bf16 weights in shards, an adapter of rank 16 on all linear layers. Each way is a process of its own;
memory is the peak of its anonymous resident memory above what it has once everything is imported (RssAnon, read every 5
ms), so that files which are merely mapped do not count. A copy is read, written and synced. The turns go round all ways
and the middle one of each is told. Needs four times --gigabytes of disk in $TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
HIDDEN, WIDE, VOCABULARY, RANK = 2048, 8192, 32000, 16
WAYS = ("copy", "original", "dequantized", "peft")

MEASURE = """
import json, os, sys, threading, time
from pathlib import Path

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.most = self.before = anonymous()
        self.running = True
    def run(self):
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)

def measured(work):
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    told = work() or {}
    seconds = time.perf_counter() - begin
    peak.running = False
    peak.join()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak.most - peak.before, **told}))
"""

COPY = (
    MEASURE
    + """
import shutil
def work():
    os.makedirs(sys.argv[3])
    for path in Path(sys.argv[1]).iterdir():
        target = Path(sys.argv[3]) / path.name
        shutil.copyfile(path, target)
        with open(target) as file:
            os.fsync(file.fileno())
measured(work)
"""
)

MERGE = (
    MEASURE
    + """
import torch, transformers, peft, bitsandbytes
from qlora_cli.merge.merge import How, merge_adapter
from qlora_cli.recipe.schema import Quantization
import qlora_cli.merging
from peft import LoraConfig
base, adapter, out, onto, modules = *map(Path, sys.argv[1:4]), sys.argv[4], json.loads(sys.argv[5])
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
how = How(Quantization(), torch.bfloat16, onto, torch.bfloat16, modules)
from qlora_cli.model.layout import read_layout
read_layout(base, torch.bfloat16)  # what transformers imports when it is first asked
torch.ones(256, 256) @ torch.ones(256, 256)
def work():
    merged = merge_adapter(base, adapter, out, how)
    return {"quantize_seconds": merged.quantize_seconds}
measured(work)
"""
)

PEFT = (
    MEASURE
    + """
import torch, transformers, peft
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:4]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.ones(256, 256) @ torch.ones(256, 256)
AutoModelForCausalLM.from_config(transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, vocab_size=8))
def work():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    model.merge_and_unload().save_pretrained(out)
    for path in Path(out).iterdir():
        with open(path) as file:
            os.fsync(file.fileno())
measured(work)
"""
)


def write_model(folder: Path, gigabytes: float) -> tuple[Path, Path, list[str], int]:
    """A base in shards and an adapter; their folders, the modules that it adapts, the bytes of the largest weight."""
    import torch
    from transformers import LlamaConfig

    from qlora_cli.model.safetensors_stream import Entry, SafetensorsWriter

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(), adapter.mkdir()
    linear = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN)}
    linear |= {"o_proj": (HIDDEN, HIDDEN), "gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN)}
    linear |= {"down_proj": (HIDDEN, WIDE)}
    per_layer = 2 * sum(rows * columns for rows, columns in linear.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / per_layer))
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=VOCABULARY, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(base)  # fmt: skip
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}]
    adapted: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        shards.append({})
        for name, shape in linear.items():
            room = "self_attn" if shape == (HIDDEN, HIDDEN) else "mlp"
            adapted[f"model.layers.{layer}.{room}.{name}"] = shape
            shards[-1][f"model.layers.{layer}.{room}.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shards[-1][f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shards.append({"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)})
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for at, tensors in enumerate(shards):
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        entries = [Entry(name, torch.bfloat16, shape) for name, shape in tensors.items()]
        with SafetensorsWriter(base / file, entries, {"format": "pt"}) as writer:
            for name, shape in tensors.items():
                writer.write(name, (torch.randn(shape, generator=generator) * 0.02).bfloat16())
                weight_map[name] = file
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "bias": "none"}
    config |= {"target_modules": sorted(linear), "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for module, (rows, columns) in adapted.items():
        for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            factors[f"base_model.model.{module}.lora_{part}.weight"] = shape
    entries = [Entry(name, torch.float32, shape) for name, shape in factors.items()]
    with SafetensorsWriter(adapter / "adapter_model.safetensors", entries) as writer:
        for name, shape in factors.items():
            writer.write(name, torch.randn(shape, generator=generator) * 0.02)
    return base, adapter, [*adapted], 4 * VOCABULARY * HIDDEN


def measure(way: str, made: tuple[Path, Path, list[str], int], out: Path, threads: int) -> dict[str, Any]:
    """One turn of one way."""
    base, adapter, modules, _ = made
    script = {"copy": COPY, "peft": PEFT}.get(way, MERGE)
    subprocess.run(["rm", "-rf", out], check=True)
    os.sync()
    command = [sys.executable, "-c", script, str(base), str(adapter), str(out), way, json.dumps(modules)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        sys.exit(ran.stderr)
    subprocess.run(["rm", "-rf", out], check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """A line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    with tempfile.TemporaryDirectory() as folder:
        made = write_model(Path(folder), wanted.gigabytes)
        size = sum(path.stat().st_size for path in made[0].glob("*.safetensors"))
        turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(wanted.turns):
            for way in WAYS:
                turns[way].append(measure(way, made, Path(folder) / "out", wanted.threads))
    copy = statistics.median(turn["seconds"] for turn in turns["copy"])
    print(f"{size / 1e9:.2f} GB in bf16; the largest weight takes {made[3] / 1e6:.0f} MB in fp32\n")
    print("| way | seconds | of them quantising | times a copy | peak above imports, MB | that less the largest, MB |")
    print("|---|---|---|---|---|---|")
    for way, found in turns.items():
        middle = sorted(found, key=lambda turn: turn["seconds"])[len(found) // 2]
        peak, seconds = max(turn["peak_bytes"] for turn in found), middle["seconds"]
        quantizing = middle.get("quantize_seconds", 0.0)
        over = (peak - made[3]) / 1e6
        print(f"| {way} | {seconds:.2f} | {quantizing:.2f} | {seconds / copy:.2f} | {peak / 1e6:.0f} | {over:.0f} |")
    if wanted.json:
        record = {"bytes": size, "largest_fp32_bytes": made[3], "threads": wanted.threads, "turns": turns}
        wanted.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
