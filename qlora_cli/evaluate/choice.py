"""Log-likelihoods of choices behind their contexts, as lm-evaluation-harness defines them, each shared token read once.

Where the model can read a tree of tokens (a mask of four dimensions and positions of our own), which is proven on the
loaded model, the choices of a row, and rows that begin alike, share the forward pass of what they have in common.
Otherwise each choice is a row of its own. Either way logits exist only where a token is predicted, for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.choice_forward import longest_in_tree, score_batch
from qlora_cli.evaluate.choice_rows import ChoiceRow
from qlora_cli.evaluate.choice_tokens import encode_rows
from qlora_cli.evaluate.choice_tree import batches_of, trees_of
from qlora_cli.model.base import Base
from qlora_cli.model.rope import rope_boundaries


@dataclass(frozen=True)
class ChoiceScore:
    """What the model makes of one choice.

    logprob: of the whole choice, in nats. is_greedy: whether greedy decoding would write it. num_characters and
    num_bytes (UTF-8): of the choice without the white space in front. num_cut: tokens of its context left out in front.
    """

    logprob: float
    is_greedy: bool
    num_tokens: int
    num_characters: int
    num_bytes: int
    num_cut: int = 0


def score_choices(
    base: Base, model: Any, rows: Sequence[ChoiceRow], token_budget: int
) -> Iterator[tuple[int, list[ChoiceScore]]]:
    """The index of each row with the scores of its choices, as they are done, the longest first.

    token_budget: tokens of one forward pass with padding; what is longer has a pass of its own. It changes no score but
    by rounding. The model is in evaluation mode until the last row is taken, then in its own. Raises UserError for a
    row that cannot be tokenised, and where the model's logits are not numbers.
    """
    encoded = list(encode_rows(base.tokenizer, rows, base.context))
    boundaries = rope_boundaries(base.config)
    done: dict[int, dict[int, ChoiceScore]] = {}
    training = model.training
    model.eval()
    try:
        trees = trees_of(encoded, boundaries, longest_in_tree(base, model))
        for batch in batches_of(trees, boundaries, token_budget):
            for row, choice, logprob, is_greedy in score_batch(base, model, batch):
                if np.isnan(logprob):
                    what = "the model's logits are not numbers"
                    raise UserError(rows[row].where, what, "check its weights and compute_dtype", Exit.FAILED)
                text, tokens = rows[row].choices[choice].lstrip(), encoded[row][choice]
                sizes = (tokens.num_tokens, len(text), len(text.encode()), tokens.num_cut)
                found = done.setdefault(row, {})
                found[choice] = ChoiceScore(logprob, is_greedy, *sizes)
                if len(found) == len(rows[row].choices):
                    yield row, [score for _, score in sorted(done.pop(row).items())]
    finally:
        model.train(training)
