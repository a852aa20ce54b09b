"""How a byte-level tokenizer cuts text before it merges, by llama.cpp's name for it.

llama.cpp has a fixed list of such cuts (src/llama-vocab.cpp) and its converter guesses the name from a hash of one
encoded text. Here the cut is read from tokenizer.json as it stands; one that is not in the table is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in ("*+", "+*"))
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"
GPT4O = rf"{_CASED[0]}{_SHORT}|{_CASED[1]}{_SHORT}|\p{{N}}{{1,3}}|{_REST_SLASH}"

Cut = tuple[tuple[str, Any], ...]
"""The steps of a pre-tokenizer: ("Split", regex), ("Digits", one by one), ("ByteLevel", by GPT-2's regex)."""


def _split(regex: str) -> Cut:
    return (("Split", regex), ("ByteLevel", False))


CUTS: dict[tuple[Cut, bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    (_split(QWEN2), False): "qwen2",
    (_split(LLAMA3), False): "smaug-bpe",
    (_split(LLAMA3), True): "llama-bpe",
    (_split(TEKKEN), True): "tekken",
    (_split(GPT4O), False): "gpt-4o",
}
"""llama.cpp's name of a cut, with whether a word that is a token as a whole is taken without merging."""

NAMES = sorted(set(CUTS.values()))


def name_of(tokenizer: dict[str, Any], where: Path) -> str:
    """llama.cpp's name for the pre-tokenizer in tokenizer.json. Raises UserError for one that it does not have."""
    cut = tuple(_step(part) for part in _parts(tokenizer["pre_tokenizer"]))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    if name := CUTS.get((cut, whole_words)):
        return name
    other = CUTS.get((cut, not whole_words))
    if other and _reaches_all(tokenizer):  # the two ways of merging then give the same tokens
        return other
    known = ", ".join(NAMES)
    what = f"llama.cpp has no pre-tokenizer that cuts as this one does: {list(cut)} (it has {known}, among others)"
    raise UserError(where, what, "export it for vLLM or load it with transformers")


def _parts(pre_tokenizer: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    """The steps of a pre-tokenizer, nested ones laid out."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [part for inner in pre_tokenizer["pretokenizers"] for part in _parts(inner)]


def _step(part: dict[str, Any]) -> tuple[str, Any]:
    """One step with all that bears on the cut; a step that is not as usual matches nothing."""
    match part:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return "Split", regex
        case {"type": "Digits", "individual_digits": one_by_one}:
            return "Digits", one_by_one
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel", part.get("use_regex", True)
    return part["type"], str(part)


def _reaches_all(tokenizer: dict[str, Any]) -> bool:
    """Whether every token is what its own text is merged to; added tokens are found before."""
    from tokenizers import models

    vocab, added = tokenizer["model"]["vocab"], {token["content"] for token in tokenizer["added_tokens"]}
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"]]
    bpe = models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs])
    return all([part.id for part in bpe.tokenize(text)] == [vocab[text]] for text in vocab.keys() - added)
