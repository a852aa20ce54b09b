"""The tokenizer of a base, and the tokens that end a turn."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.schema import Model

SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""SentencePiece's vocabularies as model folders name them."""


def load_tokenizer(folder: Path, model: Model) -> Any:
    """The tokenizer in `folder`, with model.added_tokens behind its own.

    Raises UserError where there is none, where text is to be learned and none ends, and for a token that it has.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        _refuse_missing_packages(folder)
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            folder, f"no tokenizer could be loaded: {reason}", "put the tokenizer's files into the model folder"
        ) from error
    _refuse_empty(tokenizer, folder)
    if tokenizer.eos_token_id is None and model.task in ("causal_lm", "seq2seq_lm"):
        raise UserError(
            folder / "tokenizer_config.json",
            "the tokenizer has no eos_token, so the model could never learn to stop",
            "set eos_token",
        )
    add_tokens(tokenizer, model.added_tokens)
    return tokenizer


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds tokens in their order, found in text as they are written, and shown in decoded text.

    Raises UserError for one that the tokenizer has already.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    if found := next((token for token in tokens if token in known), None):
        what = f"{found!r} is in the tokenizer already, with id {known[found]}"
        raise UserError("model.added_tokens", what, "leave it out: it has a row that training can use")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def _refuse_empty(tokenizer: Any, folder: Path) -> None:
    """Raises UserError where the vocabulary was not there: transformers 5.23 then makes one of special tokens alone."""
    files = set(type(tokenizer).vocab_files_names.values()) | {"tokenizer.json"}
    if any((folder / name).exists() for name in files):
        return
    if not tokenizer.decode(tokenizer("a")["input_ids"], skip_special_tokens=True).strip():
        _refuse_missing_packages(folder)
        what = f"no tokenizer could be loaded: there is none of {', '.join(sorted(files))}"
        raise UserError(folder, what, "put the tokenizer's files into the model folder")


def _refuse_missing_packages(folder: Path) -> None:
    """Raises UserError for a tokenizer that is a SentencePiece file alone, where what reads it is not installed.

    transformers 5.23 tells that tiktoken is required.
    """
    vocabulary = next((name for name in SENTENCEPIECE if (folder / name).exists()), None)
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [package for package, module in packages.items() if not _is_installed(module)]
    if vocabulary and missing and not (folder / "tokenizer.json").exists():
        what = f"reading it without a tokenizer.json needs {' and '.join(missing)}, not installed here"
        todo = f"run `pip install {' '.join(missing)}`, or put the model's tokenizer.json beside it"
        raise UserError(folder / vocabulary, what, todo, Exit.ENVIRONMENT)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent, google
        return False


def stop_token_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's eos and those of generation_config.json."""
    path = folder / "generation_config.json"
    named: Any = None
    if path.exists():
        try:
            named = json.loads(path.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(path, f"not a JSON object: {error}", "restore or delete the file") from error
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return frozenset([tokenizer.eos_token_id, *listed]) - {None}


def check_vocabulary(tokenizer: Any, embedding_rows: int, folder: Path, added: Collection[int] = ()) -> None:
    """Refuses a tokenizer whose ids, other than added ones, go beyond the embedding: they would index past its end."""
    largest = max(index for index in tokenizer.get_vocab().values() if index not in added)
    if largest >= embedding_rows:
        raise UserError(
            folder,
            f"the tokenizer's largest id is {largest}, the embedding has {embedding_rows} rows",
            "use the tokenizer that belongs to this model; tokens of your own go to model.added_tokens",
        )
