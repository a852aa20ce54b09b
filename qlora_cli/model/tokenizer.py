"""The tokenizer of a base, and the tokens that end a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Model


def load_tokenizer(folder: Path, model: Model) -> Any:
    """The tokenizer in `folder`. Raises UserError where there is none, or where text is to be learned and none ends."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            folder, f"no tokenizer could be loaded: {reason}", "put the tokenizer's files into the model folder"
        ) from error
    if tokenizer.eos_token_id is None and model.task in ("causal_lm", "seq2seq_lm"):
        raise UserError(
            folder / "tokenizer_config.json",
            "the tokenizer has no eos_token, so the model could never learn to stop",
            "set eos_token",
        )
    return tokenizer


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


def check_vocabulary(tokenizer: Any, embedding_rows: int, folder: Path) -> None:
    """Refuses a tokenizer whose ids go beyond the embedding: they would index past its end."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding_rows:
        raise UserError(
            folder,
            f"the tokenizer's largest id is {largest}, the embedding has {embedding_rows} rows",
            "use the tokenizer that belongs to this model (added tokens are not available yet)",
        )
