"""A reply, token by token: the generation of `qlora eval`, or sampling, with the past of the conversation kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_cli.chat.halt import Halt
from qlora_cli.chat.pieces import Pieces
from qlora_cli.chat.wanted import GREEDY, Sampling
from qlora_cli.errors import UserError
from qlora_cli.evaluate.generate import Decoding, deciding, only_numbers
from qlora_cli.model.base import Base

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """What was answered. stopped: "stop token", "max_new_tokens", "context" or "interrupted".

    kept_tokens: those of the prompt whose keys and values were there from the turn before.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    stopped: str
    seconds: float
    kept_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, the reading of the prompt included."""
        return self.generated_tokens / max(self.seconds, 1e-9)


@dataclass
class Past:
    """The keys and values of the tokens that a model has read, to read on from."""

    cache: Any = None
    ids: list[int] = field(default_factory=list)

    def common(self, ids: list[int]) -> int:
        """Cuts the past to what it shares with the ids, the last of which has to be read anew; returns its length."""
        if self.cache is None:
            return 0
        both = zip(self.ids, ids[:-1], strict=False)
        length = next((at for at, (old, new) in enumerate(both) if old != new), min(len(self.ids), len(ids) - 1))
        if length == 0:
            self.forget()
        elif length < len(self.ids):
            self.cache.crop(length - len(self.ids))
        self.ids = self.ids[:length]
        return length

    def keep(self, cache: Any, ids: list[int]) -> None:
        """Remembers the past of these ids, where it can be cut: every layer keeps every token."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        self.forget()
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            self.cache, self.ids = cache, ids[: cache.get_seq_length()]

    def forget(self) -> None:
        """Drops it."""
        self.cache, self.ids = None, []


@dataclass
class Speaker:
    """A model that answers. speaking: the context in which `model` is what `name` says."""

    name: str
    base: Base
    speaking: Callable[[], AbstractContextManager[Any]]
    past: Past = field(default_factory=Past)


class _Tokens:
    """Takes the tokens as transformers generates them, and gives out their text; a streamer of transformers."""

    def __init__(self, pieces: Pieces, stop_token_ids: frozenset[int], say: Say) -> None:
        self.pieces, self.stop_token_ids, self.say = pieces, stop_token_ids, say
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt, or a decoder's start token, at first; then one token each time."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            self.take(token)

    def take(self, token: int) -> None:
        """One token, unless a stop token came before."""
        if self.stopped or token in self.stop_token_ids:
            self.stopped = True
            return
        self.ids.append(token)
        self.tell(self.pieces.add(token))

    def tell(self, text: str) -> None:
        if text:
            self.text += text
            self.say(text)

    def end(self) -> None:
        """Transformers calls it; the rest is told when it is known why the reply ended."""


@dataclass(frozen=True)
class Manner:
    """How replies are generated: the recipe's decoding, what samples instead, and what ends a reply early.

    verbatim: a reply goes on with the prompt's text, so it may begin within a word.
    """

    decoding: Decoding
    sampling: Sampling
    verbatim: bool = False
    halt: Halt = field(default_factory=Halt)


def answer(speaker: Speaker, prompt: list[int], manner: Manner, attempt: int, say: Say) -> Reply:
    """The model's reply to a prompt's ids, said piece by piece. attempt: counts up, and is added to the seed.

    Raises UserError where the model has no position left to answer in, and where its logits are no numbers.
    """
    base, decoding = speaker.base, manner.decoding
    room = _room(base, prompt)
    limit = decoding.max_new_tokens if room is None else min(decoding.max_new_tokens, room)
    pieces = Pieces(base.tokenizer, prompt if manner.verbatim and base.task == "causal_lm" else ())
    tokens = _Tokens(pieces, base.stop_token_ids, say)
    began = time.perf_counter()
    with torch.no_grad(), speaker.speaking() as model, deciding(base, model, decoding._replace(max_new_tokens=limit)):
        kept = _generate(speaker, model, prompt, (manner, attempt), tokens)
    seconds = time.perf_counter() - began
    tokens.tell(tokens.pieces.rest())
    if tokens.stopped:
        stopped = "stop token"
    elif len(tokens.ids) < limit:
        stopped = "interrupted"
    else:
        stopped = "max_new_tokens" if limit == decoding.max_new_tokens else "context"
    return Reply(tokens.text, len(prompt), len(tokens.ids), stopped, seconds, kept)


def _generate(speaker: Speaker, model: Any, prompt: list[int], how: tuple[Manner, int], tokens: _Tokens) -> int:
    """Runs transformers' generation; returns how many tokens of the prompt were not read again."""
    (manner, attempt), base, past = how, speaker.base, speaker.past
    beams = manner.decoding.num_beams if manner.sampling.temperature == GREEDY else 1
    keeps = base.task == "causal_lm" and beams == 1
    kept = past.common(prompt) if keeps else 0
    before = {"past_key_values": past.cache} if kept else {}
    past.cache = None  # what is cut off in the middle cannot be read on from
    input_ids = torch.tensor([prompt], device=base.device)
    with base.compute():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            logits_processor=[only_numbers],
            stopping_criteria=_criteria(manner.halt),
            streamer=tokens if beams == 1 else None,
            return_dict_in_generate=True,
            **before,
            **_sampled(manner.sampling, attempt),
        )
    written = output.sequences[0].tolist()
    if beams > 1:  # are known when all are done
        for token in written[len(prompt) if base.task == "causal_lm" else 1 :]:
            tokens.take(token)
    if keeps:
        past.keep(output.past_key_values, written)
    return kept


def _room(base: Base, prompt: list[int]) -> int | None:
    """Tokens that a reply can have; None where nothing limits it. Raises UserError where there are none."""
    context = base.context
    if context is None:
        return None
    room = context - len(prompt)
    if base.task == "seq2seq_lm" and room >= 0:
        room = context - 1  # the decoder has positions of its own, and begins with a token of its own
    if room < 1:
        what = f"takes {len(prompt):,} tokens, and the model has {context:,} positions for it and the reply"
        raise UserError("the conversation", what, "begin a new one (/reset), or shorten the text")
    return room


def _sampled(sampling: Sampling, attempt: int) -> dict[str, Any]:
    """What transformers is told besides where tokens are drawn, after the seed is set."""
    if sampling.temperature == GREEDY:
        return {}
    torch.manual_seed((sampling.seed or 0) + attempt)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return {"do_sample": True, "num_beams": 1, "temperature": sampling.temperature, "top_p": top_p, "top_k": 0}


def _criteria(halt: Halt) -> Any:
    """A stopping criterion of transformers that ends a reply behind its next token."""
    from transformers import StoppingCriteriaList

    def criterion(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), halt(), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([criterion])


def always(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    """A speaking of a model that needs nothing done."""
    return lambda: nullcontext(model)
