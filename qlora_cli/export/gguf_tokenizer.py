"""The tokenizer, its stop tokens and the chat template as keys of a GGUF file: the very tokenizer that trained.

llama.cpp has one algorithm for byte-level BPE ("gpt2") and one for SentencePiece's BPE ("llama", which merges by the
scores of tokens instead of a list of merges). Constants are those of src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_cli.data.chat import chat_settings, find_template
from qlora_cli.data.conversations import system, user
from qlora_cli.data.prompts import Prompts
from qlora_cli.errors import Exit, UserError
from qlora_cli.export.gguf_architectures import WHOLE, Fields
from qlora_cli.export.gguf_pretokenizers import name_of
from qlora_cli.model.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from qlora_cli.recipe.schema import Data, Model

SPACE = "▁"  # how SentencePiece writes a space
UNRANKED = -1000.0  # the score of tokens that no merge makes, below any rank of a merge
KEY = "tokenizer.ggml."


class Kind(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    CONTROL = 3  # read only where special tokens are asked for, and not printed
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Trained:
    """What the template got beside the messages. kwargs: data.chat_template_kwargs; today: the date that it prints."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)


@dataclass(frozen=True)
class Vocabulary:
    """The keys of a tokenizer, and what llama.cpp does otherwise in rare texts."""

    fields: Fields
    notes: list[str]


def vocabulary_of(folder: Path, vocab_size: int, trained: Trained | None = None) -> Vocabulary:
    """The tokenizer of a model folder for an embedding of `vocab_size` rows.

    Raises UserError for a tokenizer whose algorithm llama.cpp does not have.
    """
    tokenizer = load_tokenizer(folder, Model(name_or_path=str(folder)))
    check_vocabulary(tokenizer, vocab_size, folder)
    where = folder / "tokenizer.json"
    if not tokenizer.is_fast:
        raise UserError(where, "the tokenizer is a slow one, whose rules cannot be read", "add a tokenizer.json")
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    model = layout["model"]
    unusual = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or unusual:
        named = model["type"] + "".join(f" with {key}" for key in unusual)
        raise UserError(where, f"llama.cpp cannot merge as this tokenizer does ({named})", WHOLE)
    template = find_template(None, tokenizer)[1]
    algorithm, notes = (_sentencepiece if model.get("byte_fallback") else _byte_level)(layout, where, template)
    texts, kinds = _tokens(layout, vocab_size, where)
    fields = algorithm | {KEY + "tokens": texts, KEY + "token_type": kinds}
    if KEY + "scores" in fields:
        ranked = fields[KEY + "scores"]
        fields[KEY + "scores"] = [ranked.get(text, UNRANKED) for text in texts]
    special, said = _special(folder, tokenizer, template)
    special[KEY + "add_bos_token"] = _adds_bos(tokenizer, template, trained or Trained())
    return Vocabulary(fields | special, notes + said + _added_notes(layout))


def _tokens(layout: dict[str, Any], vocab_size: int, where: Path) -> tuple[list[str], list[int]]:
    """Text and kind of each token, (vocab_size,) each; rows of the embedding without a token get a name."""
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [int(Kind.UNUSED)] * vocab_size
    as_bytes = layout["model"].get("byte_fallback")
    for text, index in layout["model"]["vocab"].items():
        is_byte = as_bytes and len(text) == 6 and text.startswith("<0x")
        texts[index], kinds[index] = text, int(Kind.BYTE if is_byte else Kind.NORMAL)
    for token in layout["added_tokens"]:
        text, index = token["content"], token["id"]
        control = token["special"] or _looks_special(text)
        # In llama.cpp, user-defined tokens are found before spaces are escaped.
        texts[index] = text if control else text.replace(SPACE, " ")
        kinds[index] = int(Kind.CONTROL if control else Kind.USER_DEFINED)
    if len(set(texts)) < vocab_size:
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(where, f"two tokens have the text {twice!r}, and llama.cpp needs them to differ", WHOLE)
    return texts, kinds


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter makes it a control token whatever the tokenizer says."""
    return (
        text in ("<pad>", "<mask>")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _byte_level(layout: dict[str, Any], where: Path, template: str | None) -> tuple[Fields, list[str]]:
    """Byte-level BPE: the merges, and the pre-tokenizer by its name."""
    normalizer = (layout["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(where, f"llama.cpp does not normalise byte-level text, and this does ({normalizer})", WHOLE)
    composed = "llama.cpp leaves Unicode as it is, the tokenizer composes it (NFC): decomposed text gives other tokens"
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in layout["model"]["merges"]]
    fields: Fields = {
        KEY + "model": "gpt2",
        KEY + "pre": name_of(layout, where),
        KEY + "merges": [" ".join(pair) for pair in pairs],
    }
    return fields, [composed] if normalizer else []


def _sentencepiece(layout: dict[str, Any], where: Path, template: str | None) -> tuple[Fields, list[str]]:
    """SentencePiece's BPE: scores by token, and whether a space is put before a text."""
    vocab = layout["model"]["vocab"]
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
        raise UserError(where, f"llama.cpp needs a token for every byte, <0x{missing[0]:02X}> is missing", WHOLE)
    prefix = _space_prefix(layout, where)
    fields: Fields = {
        KEY + "model": "llama",
        KEY + "pre": "default",
        KEY + "scores": _scores(layout["model"], where),
        KEY + "add_space_prefix": template is None if prefix == "first" else prefix == "always",
    }
    begins = (
        "llama.cpp puts a space before a text always or never, the tokenizer at the beginning of a text alone: set "
    )
    return fields, [begins + ("for the chat template" if template else "for plain text")] if prefix == "first" else []


def _space_prefix(layout: dict[str, Any], where: Path) -> str:
    """Where a space is put: "always" (each stretch between special tokens), "first" or "never"."""
    normalizer, cut = layout["normalizer"], layout["pre_tokenizer"]
    steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    by_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if steps == [{"type": "Prepend", "prepend": SPACE}, escape] and cut is None:
        return "always"
    if steps == [escape] and cut in (None, by_spaces):  # after the normaliser there are no spaces to split by
        return "never"
    match cut:
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False} if steps == [None]:
            return str(scheme)
    what = f"llama.cpp cannot normalise as this tokenizer does ({normalizer}, {cut})"
    raise UserError(where, what, WHOLE)


def _scores(model: dict[str, Any], where: Path) -> dict[str, float]:
    """The score of each merged token: minus the rank of its merges, which have to be those of SentencePiece.

    That is: all merges that make one token stand together, and any two tokens whose texts make a third are a merge.
    """
    pairs = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = ["".join(pair) for pair in pairs]
    scores = {text: -float(rank) for rank, text in reversed(list(enumerate(made)))}
    starts = 1 + sum(before != after for before, after in pairwise(made)) if made else 0
    vocab, known = model["vocab"], set(pairs)
    absent = next(
        (
            (text[:at], text[at:])
            for text in scores
            for at in range(1, len(text))
            if text[:at] in vocab and text[at:] in vocab and (text[:at], text[at:]) not in known
        ),
        None,
    )
    if starts != len(scores) or absent:
        why = f"{absent} is no merge" if absent else "the merges of one token do not stand together"
        raise UserError(where, f"its merges are not those of SentencePiece, which llama.cpp runs: {why}", WHOLE)
    return scores


def _special(folder: Path, tokenizer: Any, template: str | None) -> tuple[Fields, list[str]]:
    """BOS, the tokens that end a turn, padding and the template.

    llama.cpp holds three ends (eos, eot, eom), and finds well-known ones by their text.
    """
    eos = tokenizer.eos_token_id
    others = sorted(stop_token_ids(folder, tokenizer) - {eos})
    ends = [eos, *(others or [eos])]  # an eot that is set keeps llama.cpp from looking for one
    ids = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids |= {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    fields: Fields = {f"{KEY}{name}_token_id": index for name, index in ids.items() if index is not None}
    fields[KEY + "add_eos_token"] = False
    if template is not None:
        fields["tokenizer.chat_template"] = template
    left = [tokenizer.convert_ids_to_tokens(index) for index in ends[3:]]
    return fields, [f"GGUF holds three stop tokens; {', '.join(left)} stop there only if known by name"] if left else []


def _adds_bos(tokenizer: Any, template: str | None, trained: Trained) -> bool:
    """Whether rows of training begin with BOS: where the template writes it, or without one where the tokenizer does.

    llama.cpp removes the template's own BOS when it adds one, so there are never two.
    """
    if tokenizer.bos_token_id is None:
        return False
    if template is not None:
        data = Data(train=[{"path": "none"}], chat_template_kwargs=dict(trained.kwargs))  # type: ignore[list-item]
        first = _first_id(pickle.dumps(chat_settings(data, tokenizer, frozenset(), trained.today)))
        if first is not None:
            return first == tokenizer.bos_token_id
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@lru_cache(maxsize=1)  # a file is planned twice: to check it, and to write it
def _first_id(settings: bytes) -> int | None:
    """The id that a conversation under a template begins with, found in a process where limits hold.

    None where it takes neither a user's text nor a system's before it. Raises UserError where it meets a limit.
    """
    with Prompts(pickle.loads(settings)) as prompts:
        for messages in ([user("a")], [system("a"), user("a")]):
            try:
                return next(iter(prompts.of(messages).ids), None)
            except UserError as error:
                if error.code == Exit.FAILED:
                    raise
    return None


def _added_notes(layout: dict[str, Any]) -> list[str]:
    """Added tokens that swallow spaces or match words alone, which llama.cpp's do not."""
    wide = [t["content"] for t in layout["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    what = f"llama.cpp does not strip spaces beside added tokens, the tokenizer does for {', '.join(wide[:3])}"
    return [what] if wide else []
