"""Tiny random models of every task and architecture, with what a batch of them needs of a base."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from qlora_cli.data.encode import IGNORE_INDEX, Example
from tests.architectures import BART, COMMON, DEBERTA, ENCODER, GPT2, LLAMA, T5

MAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER | {"classifier_dropout": 0.0}),
    "roberta": ("Roberta", ENCODER | {"pad_token_id": 1, "type_vocab_size": 1, "classifier_dropout": 0.0}),
    "deberta-v2": ("DebertaV2", ENCODER | DEBERTA),
    "deberta": ("Deberta", ENCODER | DEBERTA | {"type_vocab_size": 2, "share_att_key": False, "cls_dropout": 0.0}),
    "bart": ("Bart", BART | {"pad_token_id": 1, "classifier_dropout": 0.0}),
    "t5": ("T5", T5 | {"classifier_dropout": 0.0}),
    "gpt2": ("GPT2", GPT2 | {"pad_token_id": 2, "classifier_dropout": 0.0}),
    "llama": ("Llama", LLAMA | {"pad_token_id": 0}),
}
"""By the beginning of the class and the config; padding where each has it."""

VOCAB, START, END = 259, 2, 2
HEADS = {
    "seq2seq_lm": "ForConditionalGeneration",
    "sequence_classification": "ForSequenceClassification",
    "question_answering": "ForQuestionAnswering",
}


@cache
def base_of(make: str, task: str, num_labels: int = 3) -> Any:
    """A model with random weights drawn from seed 0, in evaluation mode, and what `collate` asks a base for."""
    name, config = MAKES[make]
    kind = getattr(transformers, name + HEADS[task])
    labels = 2 if task == "question_answering" else num_labels
    problem = "regression" if labels == 1 else "single_label_classification"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**{**COMMON, **config, "num_labels": labels, "problem_type": problem})).eval()
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = SimpleNamespace(model_input_names=names if make in ("bert", "deberta") else names[::2])
    return SimpleNamespace(model=model, device=torch.device("cpu"), tokenizer=tokenizer, task=task, config=model.config)


def examples(task: str, lengths: list[int], num_labels: int = 3) -> list[Example]:
    """Rows of these lengths, each with an end and a segment; the same at every call."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for at, length in enumerate(lengths):
        ids = [*torch.randint(5, VOCAB, (length - 1,), generator=generator).tolist(), END]
        labels = [IGNORE_INDEX] * length
        if task == "seq2seq_lm":
            target = [*torch.randint(5, VOCAB, (2 + at % 4,), generator=generator).tolist(), END]
            ids, labels = ids + target, labels + target
        targets: dict[str, tuple[float, ...]] = {
            "seq2seq_lm": (),
            "sequence_classification": (at % num_labels if num_labels > 1 else at / 3,),
            "question_answering": (min(at, length - 1), min(at + 2, length - 1)),
        }
        rows.append(Example(ids, labels, f"a:{at}", targets[task], 0 if task == "seq2seq_lm" else length // 2))
    return rows
