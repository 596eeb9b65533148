"""HiLoRA's first stage: from one sequence's scores to candidates, a budget of components, and who gets how many.

Sec. 3.2 of `HiLoRA <https://arxiv.org/abs/2510.12266>`_, for one sequence at a time and in NumPy, so that nothing
depends on the sequences beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Allocation:
    """Components handed out to one sequence.

    Args:
        counts (np.ndarray): int64 ``(E,)``, o_e; 0 for those that are no candidates.
        candidates (np.ndarray): int64 pool positions, ascending.
        budget (int): O, the sum of the counts.
        mean_rank (float): of the candidates, those that got nothing included.
    """

    counts: np.ndarray
    candidates: np.ndarray
    budget: int
    mean_rank: float


def candidate_count(best: np.ndarray, positive: np.ndarray, pool: int) -> np.ndarray:
    """How many candidates Eq. 4 admits.

    All with a positive score, where there are any. Else the top c with c = ceil(-best), at least 1: the further the
    best score lies below zero, the more. (The paper prints ceil(best), which would be 0 or less.)

    Args:
        best (np.ndarray): largest score of each sequence ``(...,)``.
        positive (np.ndarray): number of scores above 0 ``(...,)``.
        pool (int): number of adapters with a score.

    Returns:
        np.ndarray: int64 ``(...,)``, between 1 and ``pool``.
    """
    # A score of minus infinity admits everybody; it would not fit an integer.
    distance = np.clip(np.ceil(-best), 1, pool).astype(np.int64)
    return np.where(best > 0, positive, distance)


def candidates(scores: np.ndarray) -> np.ndarray:
    """Eq. 4; among equal scores the lowest position wins.

    Args:
        scores (np.ndarray): ``(E,)``; minus infinity for adapters that cannot take part.

    Returns:
        np.ndarray: int64 pool positions, ascending; none where nobody can take part.
    """
    able = np.flatnonzero(scores > -np.inf)
    if not able.size:
        return able
    order = able[np.argsort(-scores[able], kind="stable")]
    count = candidate_count(scores[order[0]], (scores > 0).sum(), able.size)
    return np.sort(order[: int(count)])


def softmax(scores: np.ndarray) -> np.ndarray:
    """Shares pi of the candidates.

    Args:
        scores (np.ndarray): float64 ``(C,)``.

    Returns:
        np.ndarray: ``(C,)``, of sum 1.
    """
    powers = np.exp(scores - scores.max(initial=-np.inf))
    return powers / powers.sum()


def allocate(scores: np.ndarray, ranks: np.ndarray, gamma: float, generator: np.random.Generator) -> Allocation:
    """Choose candidates and draw o ~ Multinomial(O, pi) with o_e <= r_e, O = round(gamma * sum of r_e), at least 1.

    Components are drawn one after another; an adapter that is full leaves the draw. Where the shares of those left
    underflow, the rest goes to them by rank of score.

    Args:
        scores (np.ndarray): float64 ``(E,)``; minus infinity for adapters that cannot take part.
        ranks (np.ndarray): int64 ``(E,)``, the most components that an adapter can get, at least 1 where it can take
            part.
        gamma (float): share of the candidates' components that are handed out, above 0 and at most 1.
        generator (np.random.Generator): of this sequence alone.

    Returns:
        Allocation: who got how many.
    """
    chosen = candidates(scores)
    counts = np.zeros(scores.shape[0], dtype=np.int64)
    if not chosen.size:
        return Allocation(counts, chosen, 0, 0.0)
    room = ranks[chosen]
    budget = max(1, round(gamma * int(room.sum())))
    drawn = _draw(softmax(scores[chosen]), room, budget, generator)
    left = budget - int(drawn.sum())
    for place in np.argsort(-scores[chosen], kind="stable") if left else ():
        given = min(left, int(room[place] - drawn[place]))
        drawn[place] += given
        left -= given
    counts[chosen] = drawn
    return Allocation(counts, chosen, budget, float(room.mean()))


def _draw(shares: np.ndarray, room: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """The draws that shares can decide, ``(C,)``; as if made one at a time, but up to the next full adapter at once."""
    drawn = np.zeros(room.shape[0], dtype=np.int64)
    uniform = generator.random(budget)
    while uniform.size:
        ends = np.cumsum(np.where(drawn < room, shares, 0.0))
        # Below the smallest normal number shares have lost their digits.
        if ends[-1] < np.finfo(np.float64).tiny:
            break
        # The product may round up to the last end, and would then point past it.
        points = np.minimum(uniform * ends[-1], np.nextafter(ends[-1], 0.0))
        picks = np.searchsorted(ends, points, side="right")  # [budget left]
        order = np.argsort(picks, kind="stable")
        firsts = np.searchsorted(picks[order], picks[order], side="left")
        nth = np.arange(1, picks.size + 1) - firsts  # which draw of its adapter each is, in sorted order
        filling = order[drawn[picks[order]] + nth == room[picks[order]]]
        taken = int(filling.min(initial=picks.size - 1)) + 1
        drawn += np.bincount(picks[:taken], minlength=drawn.size)
        uniform = uniform[taken:]
    return drawn
