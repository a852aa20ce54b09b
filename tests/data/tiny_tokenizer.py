"""Tiny tokenizers made on the spot: nothing to download, any text can be spelled."""

from __future__ import annotations

from datetime import date
from functools import cache
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.chat import Chat, chat_settings, make_chat
from qlora_cli.recipe.schema import Data

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Below is an instruction that describes a task. Question: how many clips are there? Answer: 42 clips, 12 hours.",
    "### Instruction:\n\n### Response:\n\n user assistant system\n the answer of the question is forty two\n\n",
] * 4


@cache
def _bytes(trim_offsets: bool) -> Tokenizer:
    """Byte-level BPE in the manner of GPT-2: '\u0120clips' is one token, with or without its space in the offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


@cache
def _pieces(spell_bytes: bool) -> Tokenizer:
    """SentencePiece in the manner of Llama 2: a space first; unknown characters become bytes or vanish."""
    words = ["\u2581" + word for word in ("clips", "42", "the", "answer", "Answer")]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256 if spell_bytes else 0)]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *byte_tokens])}
    merges: list[tuple[str, str]] = []
    for symbol in ["\u2581", *map(chr, range(33, 127))]:
        vocab[symbol] = len(vocab)
    for word in words:
        for at in range(2, len(word) + 1):
            if word[:at] not in vocab:
                vocab[word[:at]] = len(vocab)
                merges.append((word[: at - 1], word[at - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>" if spell_bytes else None, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def tiny_tokenizer(
    kind: str = "bytes",
    *,
    bos: bool = False,
    eos: str | None = "</s>",
    template: str | None = CHATML,
    spell_bytes: bool = True,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose pad token is its EOS. kind: bytes, trimmed (offsets without spaces) or pieces."""
    backend = Tokenizer.from_str((_pieces(spell_bytes) if kind == "pieces" else _bytes(kind == "trimmed")).to_str())
    if bos:
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        steps = [backend.post_processor, start] if backend.post_processor else [start]
        backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_with(
    tokenizer: PreTrainedTokenizerFast,
    *stops: str,
    train_on: Literal["completion", "last", "all"] = "completion",
    **data: Any,
) -> Chat:
    """The tokenizer's chat on the second of January 2026; `stops` end a turn as its EOS does. data: keys of `data`."""
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(stops)))
    return make_chat(
        chat_settings(Data(train=[{"path": "x"}], train_on=train_on, **data), tokenizer, ids, date(2026, 1, 2))
    )


def tiny_chat(template: str | None = CHATML, *, train_on: Any = "completion", **options: Any) -> Chat:
    """A chat on a tiny tokenizer; EOS and <|im_end|> end a turn. options: tiny_tokenizer's."""
    kind = options.pop("kind", "bytes")
    return chat_with(tiny_tokenizer(kind, template=template, **options), "<|im_end|>", train_on=train_on)
