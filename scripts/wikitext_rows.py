"""Writes WikiText-2 as rows for the recipes of configs/loftq: pieces to train on, each other split as one text.

    python scripts/wikitext_rows.py meta-llama/Llama-2-7b-hf wikitext-2

OUT gets train.jsonl, whose rows are at most TOKENS tokens of the model's tokenizer, and validation.jsonl and test.jsonl
of one row each, which the suite `loss` reads in windows. All have the column `text`; nothing of the texts is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

TOKENS = 1000  # of data.max_length 1,024: BOS, EOS, and what a piece takes more when it is tokenised by itself


def main() -> None:
    """Downloads the data and the tokenizer, and writes three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id or a folder, for its tokenizer")
    parser.add_argument("out", type=Path, help="the folder for the files")
    arguments = parser.parse_args()

    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        text = "".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
        rows = [text]
        if split == "train":
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            rows = [*pieces(text, [begin for begin, _ in encoding["offset_mapping"]], TOKENS)]
        path = arguments.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows, {len(text):,} characters")


def pieces(text: str, begins: Sequence[int], most: int) -> Iterator[str]:
    """The text cut behind a space or a line break, in pieces of at most `most` tokens; they add up to the text.

    begins: the first character of each token. A piece without white space in it is cut where its tokens end.
    """
    start = token = 0
    while start < len(text):
        token += most
        end = max(begins[token], start + 1) if token < len(begins) else len(text)
        if end < len(text):
            behind = 1 + max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = behind if behind > start else end
        yield text[start:end]
        start = end
        while token and (token >= len(begins) or begins[token] > start):  # back to the first token of the next piece
            token -= 1


if __name__ == "__main__":
    main()
