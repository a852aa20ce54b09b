"""Memory that loading a model packed takes: peak anonymous resident bytes above the level after imports.

    python scripts/bench_loading.py [--data-type nf2] [--embeddings none] [--layers 24] [--json FILE]

A Llama with random bfloat16 weights is written to a temporary folder in shards of 250 MB (24 layers of hidden size 1280
are 1.0 GB) by a process of its own, and loaded by another. Pages of mapped files are left out: the kernel takes them
back when it needs them. Beside the peak stands what the loaded model holds, embeddings and head apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))


def main() -> None:
    """Writes, loads and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-type", default="nf2")
    parser.add_argument("--embeddings", default="none", help="data type of the input embedding")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1280, help="a multiple of 64")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--do", choices=["all", "write", "load"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do == "write":
        write(arguments.folder, arguments.layers, arguments.hidden)
        return
    if arguments.do == "load":
        print(json.dumps(load(arguments.folder, arguments.data_type, arguments.embeddings)))
        return
    with tempfile.TemporaryDirectory() as name:
        options = ["--data-type", arguments.data_type, "--layers", str(arguments.layers), "--folder", name]
        options += ["--embeddings", arguments.embeddings, "--hidden", str(arguments.hidden)]
        command = [sys.executable, __file__, *options, "--do"]
        subprocess.run([*command, "write"], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
        done = subprocess.run([*command, "load"], check=True, capture_output=True, text=True)
    types = {"data_type": arguments.data_type, "embeddings": arguments.embeddings}
    found = {"file_bytes": size, **types, **json.loads(done.stdout.splitlines()[-1])}
    columns = "checkpoint, MB | peak above imports, MB | loaded model, MB | of it embeddings and head, MB"
    print(f"| data type | embeddings | {columns} |")
    print("|---|---|---|---|---|---|")
    shown = [found[name] / 1e6 for name in ("file_bytes", "peak_bytes", "model_bytes", "embedding_bytes")]
    print(f"| {arguments.data_type} | {arguments.embeddings} | {' | '.join(f'{one:,.0f}' for one in shown)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def write(folder: Path, layers: int, hidden: int) -> None:
    """The checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="250MB")


def load(folder: Path, data_type: str, embeddings: str) -> dict[str, Any]:
    """Peak above the level after imports, and what is held in the end, in bytes."""
    import torch
    import transformers
    from data_runs import peak_anonymous
    from torch import nn

    from qlora_cli.quant.layers import quantization_config, stored_tensors
    from qlora_cli.recipe.schema import Quantization

    types = {"data_type": data_type, "embeddings": embeddings}
    chosen = quantization_config(Quantization.model_validate(types), torch.bfloat16)
    assert transformers.LlamaForCausalLM is not None, "imported before it is measured"
    with peak_anonymous(0.01) as level:
        pass
    before = level[0]
    with peak_anonymous(0.01) as peak:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=chosen, device_map={"": "cpu"}
        )
    sizes = [(kind, one.numel() * one.element_size()) for kind, one in stored_tensors(model)]
    ends = nn.ModuleList([model.get_input_embeddings(), model.get_output_embeddings()])
    return {
        "peak_bytes": peak[0] - before,
        "model_bytes": sum(size for _, size in sizes),
        "embedding_bytes": sum(one.numel() * one.element_size() for one in (*ends.parameters(), *ends.buffers())),
    }


if __name__ == "__main__":
    main()
