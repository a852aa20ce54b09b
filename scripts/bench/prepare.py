"""Writes what all contestants of a case read, in a process of its own: a model of random weights, and rows.

    python scripts/bench/prepare.py CASE.json MODELS_FOLDER DATA_FOLDER

Weights are drawn with a standard deviation of 1 / sqrt(hidden), so that the loss of the start depends on the rows and
the gate can tell wrong ones. Speed and memory do not depend on what the weights are. Drawn rows are words of a
vocabulary that has one word for every id. The rows as ids are in the order in which ours goes through them.
"""

from __future__ import annotations

import json
import random
import sys
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cases import TOKENIZER, Case, Shape, read_case
from contestant_ours import recipe_of
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_cli.display import QuietReport
from qlora_cli.model.base import find_base
from qlora_cli.train.reading import open_feed

SHARD_BYTES = 2 * 2**30
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    """Model, tokenizer, texts and ids."""
    case, stored, data = read_case(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    weights = stored / case.shape.name
    if not (weights / "config.json").exists():
        write_model(weights, case.shape, case.seed)
    case.model.mkdir(parents=True, exist_ok=True)
    for file in weights.iterdir():
        (case.model / file.name).symlink_to(file.resolve())
    words = real_words(data / TOKENIZER) if case.data else drawn_words(case.shape.vocab)
    words.save_pretrained(case.model)
    case.texts.write_text(real_rows(case, data) if case.data else drawn_rows(case))
    write_ids(case)


def write_model(folder: Path, shape: Shape, seed: int) -> None:
    """bfloat16 weights of the shape, shard after shard; config.json last."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": shape.tied,
    }
    ends = {"bos_token_id": None, "eos_token_id": shape.vocab - 1}
    config = LlamaConfig(**sizes, **ends, max_position_embeddings=2**17, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draws = torch.Generator(device).manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for name, tensor in dict(model.named_parameters()).items():  # which name tied weights once
        drawn = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        scale = shape.hidden**-0.5
        shard[name] = (drawn.fill_(1) if "norm" in name else drawn.normal_(0, scale, generator=draws)).cpu()
        if sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
            _save(folder, shard, places)
    _save(folder, shard, places)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def _save(folder: Path, shard: dict[str, torch.Tensor], places: dict[str, str]) -> None:
    """Writes a shard and empties it."""
    if shard:
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
        shard.clear()


def real_words(file: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with a ChatML template."""
    words = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>", pad_token="<|im_end|>")
    words.chat_template = CHATML
    return words


def drawn_words(vocab: int) -> PreTrainedTokenizerFast:
    """A word for every id: w0, w1, ... and the end."""
    ids = {f"w{index}": index for index in range(vocab - 1)} | {"</s>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def real_rows(case: Case, data: Path) -> str:
    """The first rows of the case's file, in its own format."""
    text = (data / case.data).read_text(encoding="utf-8")
    if case.data.endswith(".json"):
        return json.dumps(json.loads(text)[: case.num_rows])
    return "".join(text.splitlines(keepends=True)[: case.num_rows])


def drawn_rows(case: Case) -> str:
    """As many rows as there are places in all steps, of `length` tokens with the end that every text gets."""
    draws = random.Random(case.seed)
    lines = []
    for _ in range(case.needed_steps * case.rows_per_step):
        words = (f"w{draws.randrange(case.shape.vocab - 1)}" for _ in range(case.length - 1))
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    return "".join(lines)


def write_ids(case: Case) -> None:
    """The rows as the package encodes them: over drawn rows the windows of all steps, over real ones the first pass."""
    recipe = recipe_of(case)
    size = recipe.training.micro_batch_size
    feed = open_feed(recipe, find_base(recipe), QuietReport(), date.today(), size)
    steps = feed.total_steps(1, None) if case.data else case.needed_steps
    with case.rows.open("w") as file:
        for window, _ in islice(feed.windows(steps, 0, None), steps):
            for row in window.rows:
                file.write(json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n")


if __name__ == "__main__":
    main()
