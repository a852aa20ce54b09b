"""A tournament from judgements: Elo over many orders of the games, and scores in percent of a reference's.

Source: the QLoRA paper, section 5.2 and tables 1, 6 and 7.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.errors import UserError
from qlora_cli.evaluate.judgements import Judgement, Judgements, read_judgements

K = 32
START = 1000.0
SCALE = 400 / math.log(10)
"""A player who is rated so much higher is expected to win e times as often as to lose."""

Z = 1.96
"""Standard errors to either side of a mean that hold 95% of a normal distribution."""

INDICES_AT_ONCE = 2**24
"""Games times orders that are held at a time: 64 MiB of indices."""


def arena(targets: Sequence[str], reference: str | None, seed: int, orders: int) -> dict[str, Any]:
    """The tournament of the judgements in files, folders and patterns, as one JSON object.

    reference: the model whose scores are 100 percent; where None, the one that was part of every scored judgement.
    Raises UserError for what cannot be read, and for a reference that was not scored.
    """
    read = read_judgements(targets)
    notes: list[str] = []
    names = sorted({name for one in read.usable for name in (one.first, one.second)})
    scored = [one for one in read.usable if one.scores]
    chosen = checked_reference(reference, names, scored) if reference else common_model(scored)
    if scored and chosen is None:
        notes.append("no percentages: no one model is part of all scored judgements; name it with --reference")
    if len(groups := connected(read.usable)) > 1:
        told = "; ".join(", ".join(sorted(group)) for group in groups)
        notes.append(f"ratings compare only models that met, be it through others; there are {len(groups)}: {told}")
    percent = percent_of(chosen, scored) if chosen else None
    return {
        **counted(read),
        "elo": {"k": K, "start": START, "orders": orders, "seed": seed, "models": ranking(read.usable, orders, seed)},
        "percent": percent and {"reference": chosen, "models": percent},
        "notes": [*notes, *one_sided(chosen, percent or [])],
    }


def counted(read: Judgements) -> dict[str, Any]:
    """What was read: files, judgements, those left out with their places, and how often the answer shown first won."""
    results = [one.outcome for one in read.usable]
    return {
        "num_files": read.num_files,
        "num_judgements": len(read.usable) + len(read.left_out),
        "left_out": [{"where": one.where, "what": one.what} for one in read.left_out],
        "first_won": results.count(1.0),
        "second_won": results.count(0.0),
        "ties": results.count(0.5),
    }


# ── Elo ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ranking(games: Sequence[Judgement], orders: int, seed: int) -> list[dict[str, Any]]:
    """Each model's rating, best first: its mean over the orders, the 95% interval of that mean (± ci95), and the
    range of the middle 95% of the orders; with its games, wins, ties and losses."""
    names = sorted({name for game in games for name in (game.first, game.second)})
    index = {name: at for at, name in enumerate(names)}
    players = np.array([(index[game.first], index[game.second]) for game in games])
    outcomes = np.array([game.outcome for game in games])
    ratings = elo(players, outcomes, len(names), random_orders(len(games), orders, seed))
    low, high = np.percentile(ratings, [2.5, 97.5], axis=0)
    error = Z * ratings.std(axis=0, ddof=1) / math.sqrt(orders)
    rows = []
    for name, at in index.items():
        own = np.concatenate([outcomes[players[:, 0] == at], 1 - outcomes[players[:, 1] == at]])
        row = {"model": name, "elo": float(ratings[:, at].mean()), "ci95": float(error[at])}
        row |= {"low": float(low[at]), "high": float(high[at]), "games": len(own)}
        row |= {key: int((own == won).sum()) for key, won in (("wins", 1), ("ties", 0.5), ("losses", 0))}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["elo"])


def random_orders(num_games: int, orders: int, seed: int) -> Iterable[NDArray[np.int32]]:
    """Seeded orders of the games in blocks, int32 (block, num_games); the block's size does not change them."""
    generator = np.random.default_rng(seed)
    block = max(1, INDICES_AT_ONCE // num_games)
    for begin in range(0, orders, block):
        size = min(block, orders - begin)
        yield np.stack([generator.permutation(num_games).astype(np.int32) for _ in range(size)])


def elo(
    players: NDArray[np.int_], outcomes: NDArray[np.float64], num_players: int, blocks: Iterable[NDArray[np.int32]]
) -> NDArray[np.float64]:
    """Ratings after all games, (orders, num_players), one row for each order in the blocks.

    players (games, 2), first and second; outcomes (games,), the first one's result. All orders of a block take their
    next game at once.
    """
    done = []
    for block in blocks:
        ratings = np.full((len(block), num_players), START)
        flat, begin = ratings.reshape(-1), np.arange(len(block)) * num_players
        for game in np.ascontiguousarray(block.T):
            first, second = players[game].T + begin
            expected = 1 / (1 + np.exp((flat[second] - flat[first]) / SCALE))
            change = K * (outcomes[game] - expected)
            flat[first] += change
            flat[second] -= change
        done.append(ratings)
    return np.concatenate(done)


def connected(games: Iterable[Judgement]) -> list[set[str]]:
    """The models in groups that met, be it through others."""
    groups: list[set[str]] = []
    for pair in {(game.first, game.second) for game in games}:
        touched = [group for group in groups if not group.isdisjoint(pair)]
        groups = [group for group in groups if group.isdisjoint(pair)] + [set(pair).union(*touched)]
    return sorted(groups, key=min)


# ── percent of a reference ───────────────────────────────────────────────────────────────────────────────────────────


def common_model(scored: Sequence[Judgement]) -> str | None:
    """The one model that is part of every scored judgement; None where there is none, or two."""
    common = set.intersection(*({one.first, one.second} for one in scored)) if scored else set()
    return common.pop() if len(common) == 1 else None


def checked_reference(reference: str, names: Sequence[str], scored: Sequence[Judgement]) -> str:
    """The reference itself. Raises UserError where it is no model of the judgements, or was not scored."""
    if reference not in names:
        close = difflib.get_close_matches(reference, names, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise UserError("--reference", f"no model is called {reference!r}", f"{guess}choose one of {', '.join(names)}")
    if not any(reference in (one.first, one.second) for one in scored):
        raise UserError("--reference", f"no judgement scores {reference}", 'add ratings with "score": [first, second]')
    return reference


def percent_of(reference: str, scored: Iterable[Judgement]) -> list[dict[str, Any]]:
    """For each model its mean score in percent of the reference's, over the judgements of the two, best first.

    Judgements of both orders count alike, as in table 6; beside it those where the model was shown first, and second.
    """
    met: dict[str, list[tuple[float, float, bool, str]]] = {}
    for number, one in enumerate(scored):
        if one.scores and reference in (one.first, one.second):
            is_first = one.second == reference
            model, scores = (one.first, one.scores) if is_first else (one.second, one.scores[::-1])
            met.setdefault(model, []).append((*scores, is_first, one.question or f"row {number}"))
    rows = []
    for model, told in met.items():
        own, other = (np.array([row[at] for row in told], float) for at in (0, 1))
        leads = np.array([row[2] for row in told])
        if not other.sum():
            raise UserError("--reference", f"{reference} scored 0 beside {model}", "choose another reference")
        row: dict[str, Any] = {"model": model, "percent": ratio(own, other)}
        row["ci95"] = ratio_error(own, other, [question for *_, question in told])
        row |= {"shown_first": ratio(own[leads], other[leads])}
        row |= {"shown_second": ratio(own[~leads], other[~leads])}
        rows.append({**row, "num_judgements": len(told)})
    return sorted(rows, key=lambda row: -row["percent"])


def ratio(own: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """sum(own) / sum(other) in percent; None where `other` sums to nothing."""
    return float(100 * own.sum() / other.sum()) if other.sum() else None


def ratio_error(own: NDArray[np.float64], other: NDArray[np.float64], questions: Sequence[str]) -> float | None:
    """Half of the 95% interval of sum(own) / sum(other) in percent; None where only one question was asked.

    The linearised variance of a ratio over questions drawn at random: judgements of one question, such as those of
    both orders, are one draw. Source: Cochran, Sampling Techniques, section 6.3.
    """
    _, question = np.unique(questions, return_inverse=True)
    residuals = np.bincount(question, own - own.sum() / other.sum() * other)
    num = len(residuals)
    if num < 2:
        return None
    return float(100 * Z * math.sqrt(num / (num - 1) * (residuals**2).sum()) / other.sum())


def one_sided(reference: str | None, percent: Iterable[dict[str, Any]]) -> list[str]:
    """A note for each model that was judged in one order alone: judges favour a place."""
    words = {"shown_first": "second", "shown_second": "first"}
    return [
        f"{row['model']} was only ever shown {word}, {reference} beside it: a judge may favour a place"
        for row in percent
        for key, word in words.items()
        if row[key] is None
    ]
