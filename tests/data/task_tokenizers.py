"""Small tokenizers with the special tokens of BERT, RoBERTa, T5, BART and Llama, and the real ones where they are.

Each is made once: a trainer breaks ties anew each time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import SHARED

CORPUS = [
    "The capital of France is Paris, a city on the river Seine with two million people.",
    "Who wrote the play? The play about a prince was written by William Shakespeare in about 1600.",
    "A man is playing a large flute. A young child rides a horse near the house.",
] * 4
TYPES = ["input_ids", "token_type_ids", "attention_mask"]


def _trained(tokenizer: Tokenizer, kind: Any, special: list[str], **options: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, kind(vocab_size=400, special_tokens=special, show_progress=False, **options))
    return tokenizer


def _byte_level(special: list[str], trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(tokenizer, trainers.BpeTrainer, special, initial_alphabet=alphabet)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


@cache
def bert() -> PreTrainedTokenizerFast:
    """[CLS] a [SEP] b [SEP], in lower case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _trained(tokenizer, trainers.WordPieceTrainer, special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _bert_names(tokenizer)


def _bert_names(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=TYPES, **names)


@cache
def roberta() -> PreTrainedTokenizerFast:
    """<s> a </s></s> b </s>, offsets without the space before a word; BART's are the same."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"], trim_offsets=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


@cache
def gpt2() -> PreTrainedTokenizerFast:
    """Texts one behind the other, offsets with the space before a word."""
    tokenizer = _byte_level(["<|endoftext|>"], trim_offsets=False)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


@cache
def t5() -> PreTrainedTokenizerFast:
    """a </s> b </s>, SentencePiece's unigram pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    _trained(tokenizer, trainers.UnigramTrainer, ["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


@cache
def llama() -> PreTrainedTokenizerFast:
    """<s> a <s> b, without an end."""
    tokenizer = _byte_level(["<unk>", "<s>", "</s>"], trim_offsets=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


def real(name: str) -> Path:
    path = SHARED / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"the real tokenizer is not there ({path})")
    return path


@cache
def real_bert() -> PreTrainedTokenizerFast:
    return _bert_names(Tokenizer.from_file(str(real("bert-uncased/tokenizer.json"))))


@cache
def real_gpt2() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_file(str(real("gpt2/tokenizer.json")))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


@cache
def real_roberta() -> PreTrainedTokenizerFast:
    """GPT-2's vocabulary between RoBERTa's special tokens."""
    tokenizer = Tokenizer.from_file(str(real("gpt2/tokenizer.json")))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    ends = [(text, tokenizer.token_to_id(text)) for text in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=[TYPES[0], TYPES[2]], **names)


@cache
def real_smollm() -> PreTrainedTokenizerFast:
    path = real("smollm2-135m-instruct/tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>", bos_token="<|im_start|>")


@cache
def real_t5() -> Any:
    """T5's pieces, from SentencePiece's file."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=pieces_of(real("t5-spiece/sentencepiece.model").read_bytes()), extra_ids=0)


def pieces_of(model: bytes) -> list[tuple[str, float]]:
    """Text and score of each piece: field 1 of SentencePiece's ModelProto, in which they are the fields 1 and 2."""
    pieces, at = [], 0
    while at < len(model) and model[at] == 0x0A:  # messages of less than 128 bytes
        piece = model[at + 2 : at + 2 + model[at + 1]]
        text = piece[2 : 2 + piece[1]]
        (score,) = struct.unpack_from("<f", piece, 2 + len(text) + 1)
        pieces.append((text.decode(), score))
        at += 2 + model[at + 1]
    return pieces


SMALL: dict[str, Callable[[], Any]] = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "t5": t5, "llama": llama}
REAL: dict[str, Callable[[], Any]] = {
    "real bert": real_bert,
    "real gpt2": real_gpt2,
    "real roberta": real_roberta,
    "real smollm": real_smollm,
    "real t5": real_t5,
}
TOKENIZERS = SMALL | REAL
