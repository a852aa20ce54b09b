"""A sequence-to-sequence study on real weights: American pronunciation taught to speak British.

    python scripts/study_g2p.py ../shared/data OUT [--variants nf4,none]

Base: a BART of 751,488 weights that spells English words in American phonemes (mlalma/MisakiSwift). Task: British ones,
of lower-case words of 4 to 19 letters. The four symbols that only the British dictionary has take the ids of four that
only the American one has. 1,000 words, drawn by a seed, are held out and never trained on. Each variant is the same
recipe but for `quantization.data_type` and `adapter.init`; trained and measured by `qlora train` and `qlora eval`.
The ceiling is the model that was trained on the British dictionary.

OUT/results.json holds the figures, OUT/NAME the runs; variants that are there already are measured, not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
AS_AMERICAN = str.maketrans({"a": "æ", "ː": "ɾ", "ɒ": "ʔ", "Q": "O"})
"""Symbols of the British dictionary alone, and the American-only ones whose ids they take."""

HELD_OUT, SEED = 1_000, 0

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"quantization": {"data_type": "none"}},
    "nf4": {"quantization": {"data_type": "nf4"}},
    "nf2": {"quantization": {"data_type": "nf2"}},
    "nf2-loftq": {"quantization": {"data_type": "nf2"}, "adapter": {"init": "loftq"}},
    "int2": {"quantization": {"data_type": "int2"}},
    "int2-loftq": {"quantization": {"data_type": "int2"}, "adapter": {"init": "loftq"}},
}

RECIPE: dict[str, Any] = {
    "model": {"task": "seq2seq_lm"},
    "adapter": {"r": 16, "alpha": 16},
    "data": {"max_length": 64},
    "training": {
        "max_steps": 1500,
        "micro_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "learning_rate": 4e-3,
        "optimizer": "adamw",
        "max_grad_norm": 1.0,
        "eval_steps": 500,
        "save_steps": 500,
        "logging_steps": 100,
        "seed": SEED,
    },
    "evaluation": {"batch_size": 250, "max_new_tokens": 40},
}


def main() -> None:
    """Trains and measures every variant, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with weights/g2p-bart-us, weights/gb_gold.json, ...")
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: all")
    options = parser.parse_args()
    weights, out = options.data / "weights", options.out
    out.mkdir(parents=True, exist_ok=True)
    words = british_words(weights)
    write_rows(out, words)
    us = write_base(weights / "g2p-bart-us", out / "base-us")
    gb = write_base(weights / "g2p-bart-gb", out / "base-gb")
    results: dict[str, Any] = {"words": len(words), "held_out": HELD_OUT, "variants": {}}
    results["ceiling"] = measured(
        recipe_of(out, "ceiling", gb, {"quantization": {"data_type": "none"}}, "heldout-gb.jsonl")
    )
    for name in options.variants.split(","):
        path = recipe_of(out, name, us, VARIANTS[name], "heldout.jsonl")
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qlora_cli", "train", path], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        found = measured(path)
        results["variants"][name] = {**found, "seconds": round(seconds)}
        (out / "results.json").write_text(json.dumps(results, indent=1))
    print_table(results)


def british_words(weights: Path) -> list[tuple[str, str]]:
    """Lower-case words of 4 to 19 letters with the one pronunciation that the British dictionary has."""
    known = set(json.loads((weights / "g2p-bart-gb/config.json").read_text())["phoneme_chars"])
    gold = json.loads((weights / "gb_gold.json").read_text())
    return sorted(
        (word, said)
        for word, said in gold.items()
        if isinstance(said, str) and re.fullmatch("[a-z]{4,19}", word) and known.issuperset(said)
    )


def write_rows(out: Path, words: list[tuple[str, str]]) -> None:
    """train.jsonl and heldout.jsonl with American ids, heldout-gb.jsonl with the British symbols themselves."""
    shuffled = list(words)
    random.Random(SEED).shuffle(shuffled)
    held_out, trained = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    for name, rows, table in (
        ("train", trained, AS_AMERICAN),
        ("heldout", held_out, AS_AMERICAN),
        ("heldout-gb", held_out, {}),
    ):
        lines = [json.dumps({"source": word, "target": said.translate(table)}) for word, said in rows]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_base(weights: Path, folder: Path) -> Path:
    """The published weights with a tokenizer made of the character maps in their config.json.

    Letters and phonemes have ids of their own maps, which overlap. Each lower-case letter has the id of the phoneme of
    the same name, or one beyond the phonemes, so one vocabulary serves both sides.
    """
    folder.mkdir(exist_ok=True)
    shutil.copyfile(weights / "model.safetensors", folder / "model.safetensors")
    config = json.loads((weights / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}, indent=1))
    phonemes, letters = config["phoneme_chars"], config["grapheme_chars"]
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    vocab |= {letter: index for index, letter in enumerate(phonemes) if index >= len(SPECIAL)}
    for index, letter in enumerate(letters):
        if letter.islower():
            assert vocab.setdefault(letter, index) == index, f"{letter} has two ids"
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def recipe_of(out: Path, name: str, base: Path, changes: dict[str, Any], held_out: str) -> str:
    """Writes the recipe of a variant and returns its path."""
    recipe = {section: {**RECIPE.get(section, {}), **changes.get(section, {})} for section in {*RECIPE, *changes}}
    recipe["model"]["name_or_path"] = str(base)
    recipe["data"] |= {"train": [{"path": str(out / "train.jsonl")}], "eval": [{"path": str(out / held_out)}]}
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(out / name)}))
    return str(path)


def measured(recipe: str) -> dict[str, Any]:
    """Figures of the adapter and of what it began with, or of the base alone."""
    command = [sys.executable, "-m", "qlora_cli", "eval", recipe, "--baseline", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["models"]


def print_table(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    print(f"held-out exact match of {results['held_out']:,} words; native British model: ", end="")
    print(f"{results['ceiling']['base']['exact_match']:.3f}\n")
    print("| variant | before | after | loss after | seconds of training |\n|---|---|---|---|---|")
    for name, found in results["variants"].items():
        before = found.get("base") or found["start"]
        after = found["adapter"]
        print(
            f"| {name} | {before['exact_match']:.3f} | {after['exact_match']:.3f} | {after['loss']:.4f} "
            f"| {found['seconds']} |"
        )


if __name__ == "__main__":
    main()
