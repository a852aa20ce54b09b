"""The forward pass over trees of tokens, with logits only where a token is predicted, and whether a model can do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from qlora_cli.evaluate.choice_tokens import Encoded
from qlora_cli.evaluate.choice_tree import Candidate, Tree, grow, tree_mask
from qlora_cli.kernels.output_layer import head_at
from qlora_cli.kernels.packed_attention import unwrapped
from qlora_cli.model.base import Base

LOGITS_AT_ONCE = {"cpu": 32, "cuda": 1024}
"""Predictions whose logarithms are taken at a time, by device: those of a whole batch would not fit into a cache."""

EXACT, ROUNDED = 1e-3, 0.05
"""What rounding may make of logits in fp32, and in 16 bits: root mean square ÷ that of the logits around their mean."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""What configs and layers call the tokens that a token sees of those before it."""

LONGEST_BRANCH = 8192
"""Tokens of a choice with its context beyond which a mask, with the square of them, would cost more than it saves."""


class Scored(NamedTuple):
    """The log-likelihood of a choice in nats, and whether each of its tokens is the likeliest."""

    row: int
    choice: int
    logprob: float
    is_greedy: bool


@torch.no_grad()
def score_batch(base: Base, model: Any, trees: Sequence[Tree]) -> list[Scored]:
    """Every choice of the trees, which all have branches or all have none."""
    length = max(len(tree.tokens) for tree in trees)
    members = [(number * length, member) for number, tree in enumerate(trees) for member in tree.members]
    at = np.concatenate([start + member.nodes for start, member in members])
    kept, prediction = np.unique(at, return_inverse=True)
    targets = np.concatenate([member.targets for _, member in members])
    logits = _logits(base, model, trees, torch.from_numpy(kept))
    logprobs, greedy = _looked_up(logits, torch.from_numpy(prediction), torch.from_numpy(targets))
    found, begin = [], 0
    for _, member in members:
        end = begin + len(member.nodes)
        found.append(Scored(member.row, member.choice, float(logprobs[begin:end].sum()), bool(greedy[begin:end].all())))
        begin = end
    return found


def _looked_up(logits: Tensor, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each target (M,), predicted by the logits (N, V) at `prediction` (M,): its log-probability, and whether it is
    the likeliest token, of equal ones the first.

    Returns (M,) float64, from fp32, and (M,) bool on the CPU, as prediction and targets are.
    """
    at_once = LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cpu"])
    order = prediction.argsort()
    bounds = torch.searchsorted(prediction[order], torch.arange(0, len(logits), at_once)[1:])
    logprobs = torch.empty(len(targets), dtype=torch.float64)
    greedy = torch.empty(len(targets), dtype=torch.bool)
    for part, which in enumerate(order.tensor_split(bounds)):
        begin = part * at_once
        each = log_softmax(logits[begin : begin + at_once].float(), dim=-1)
        rows, columns = (tensor[which].to(logits.device) for tensor in (prediction - begin, targets))
        found = each[rows, columns]
        logprobs[which] = found.double().cpu()
        # the highest is found by vector instructions, its place is not: asked for only where the target is as high
        highest = (found >= each.amax(dim=-1)[rows]).nonzero().squeeze(1)
        is_first = torch.zeros(len(which), dtype=torch.bool, device=logits.device)
        is_first[highest] = each[rows[highest]].argmax(dim=-1) == columns[highest]
        greedy[which] = is_first.cpu()
    return logprobs, greedy


def _logits(base: Base, model: Any, trees: Sequence[Tree], kept: Tensor) -> Tensor:
    """The (N, V) logits at the places `kept` (N,) of the batch, counted through its padded rows."""
    input_ids = _padded([tree.tokens for tree in trees], base.device)
    arguments: dict[str, Any]
    if trees[0].has_branches:
        mask = tree_mask(_padded([tree.ends for tree in trees], base.device), base.compute_dtype)
        positions = _padded([tree.positions for tree in trees], base.device)
        arguments = {"attention_mask": mask, "position_ids": positions}
    else:
        arguments = {"attention_mask": _padded([np.ones_like(tree.tokens) for tree in trees], base.device)}
    with base.compute(), head_at(unwrapped(model), kept.to(base.device)) as selected:
        logits = model(input_ids=input_ids, use_cache=False, **arguments).logits
    return logits[0] if selected else logits.flatten(0, 1)[kept.to(base.device)]


def _padded(rows: Sequence[Any], device: torch.device) -> Tensor:
    """(B, T) int64 on the device, zeros behind each row."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return torch.from_numpy(padded).to(device, non_blocking=True)


# ── whether the model can read trees ─────────────────────────────────────────────────────────────────────────────────


def longest_in_tree(base: Base, model: Any) -> int:
    """Tokens of a choice up to which the model, in evaluation mode, reads trees with branches rightly; 0 where not.

    Asked of the model itself: two trees must give the logits that their branches give alone, up to rounding, and no bit
    of one branch may depend on another's tokens. A sliding window is an upper bound, since the mask stands in for it.
    """
    generator = np.random.default_rng(0)
    shared, *tails = (generator.integers(len(base.tokenizer), size=size) for size in (6, 5, 4, 7, 3))
    changed = [(tail + index % 2) % len(base.tokenizer) for index, tail in enumerate(tails)]
    alone = _tail_logits(base, model, shared, [[tail] for tail in tails])
    try:
        together, other = (_tail_logits(base, model, shared, [two[:2], two[2:]]) for two in (tails, changed))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # anybody's model code, given what it was not written for
        return 0
    difference = (torch.cat(together) - torch.cat(alone)).norm() / (torch.cat(alone) - torch.cat(alone).mean()).norm()
    is_close = difference <= (EXACT if base.compute_dtype == torch.float32 else ROUNDED)
    is_apart = all(torch.equal(left, right) for left, right in zip(together[::2], other[::2], strict=True))
    return _shortest_window(model) if is_close and is_apart else 0


@torch.no_grad()
def _tail_logits(base: Base, model: Any, shared: Any, trees: Sequence[Sequence[Any]]) -> list[Tensor]:
    """The (length - 1, V) float32 logits behind each token of each tail but the last, its tree behind `shared`."""
    grown = []
    for tails in trees:
        encoded = [Encoded(np.concatenate([shared, tail]).astype(np.int32), len(tail) - 1, 0) for tail in tails]
        grown.append(grow([Candidate(0, choice, each) for choice, each in enumerate(encoded)]))
    length = max(len(tree.tokens) for tree in grown)
    nodes = []
    for number, tree in enumerate(grown):
        nodes += [number * length + member.nodes for member in sorted(tree.members, key=lambda each: each.choice)]
    logits = _logits(base, model, grown, torch.from_numpy(np.concatenate(nodes))).float()
    return list(logits.split([len(each) for each in nodes]))


def _shortest_window(model: Any) -> int:
    """Tokens of the shortest sliding window of any layer, or LONGEST_BRANCH."""
    config = unwrapped(model).config
    holders = [config, config.get_text_config(), *unwrapped(model).modules()]
    found = [getattr(holder, name, None) for holder in holders for name in WINDOWS]
    return min([LONGEST_BRANCH, *(window for window in found if isinstance(window, int) and window > 0)])
