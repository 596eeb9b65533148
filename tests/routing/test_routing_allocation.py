"""HiLoRA's allocation against a reference that draws one component at a time, Sec. 3.2."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from hub_router.routing.allocation import allocate, candidates, softmax


def reference(scores: list[float], ranks: list[int], gamma: float, uniform: list[float]) -> list[int]:
    """o_e, with the uniform numbers that decide the draws."""
    order = sorted((e for e in range(len(scores)) if scores[e] > -math.inf), key=lambda e: (-scores[e], e))
    chosen = [e for e in order if scores[e] > 0]  # Eq. 4
    if not chosen:
        chosen = order[: max(1, math.ceil(abs(scores[order[0]])))] if order else []
    counts = [0] * len(scores)
    if not chosen:
        return counts
    powers = {e: math.exp(scores[e] - scores[order[0]]) for e in chosen}
    pi = {e: powers[e] / sum(powers.values()) for e in chosen}
    for step in range(max(1, round(gamma * sum(ranks[e] for e in chosen)))):
        left = [e for e in sorted(chosen) if counts[e] < ranks[e]]
        total = sum(pi[e] for e in left)
        if total < 2.3e-308:
            picked = next(e for e in order if e in left)
        else:
            point = uniform[step] * total
            for picked in left:
                point -= pi[picked]
                if point < 0:
                    break
        counts[picked] += 1
    return counts


def test_candidates() -> None:
    assert candidates(np.array([0.5, -1.0, 2.0, 0.0])).tolist() == [0, 2]
    assert candidates(np.array([-1.2, -0.5, -9.0])).tolist() == [1]
    assert candidates(np.array([-3.0, -1.5, -1.2, -9.0])).tolist() == [1, 2]
    assert candidates(np.array([-2.0, -2.0, -2.0])).tolist() == [0, 1]
    assert candidates(np.array([-20.0, -15.3, -40.0])).tolist() == [0, 1, 2]
    assert candidates(np.array([-1.0, 0.0])).tolist() == [1]
    assert candidates(np.array([-np.inf, -5.0, -np.inf, -6.0])).tolist() == [1, 3]
    assert candidates(np.array([-np.inf])).tolist() == []


POOLS = {
    "one": ([0.3], [8]),
    "positive": ([0.5, -1.0, 2.0, 1.9, 0.1], [8, 16, 4, 64, 1]),
    "negative": ([-15.0, -14.2, -14.9, -40.0, -15.1], [4, 4, 8, 16, 2]),
    "steep": ([30.0, 1.0, 0.5, 40.0], [3, 5, 7, 2]),
    "hundreds apart": ([900.0, 2.0, 1.0, 80.0, 500.0], [4, 6, 5, 3, 8]),
    "underflow among equals": ([1000.0, 5.0, 5.0, 4.9], [2, 4, 4, 4]),
    "equal": ([1.0] * 12, [3] * 12),
    "some cannot": ([-np.inf, 0.2, -np.inf, 0.4], [0, 6, 0, 2]),
    "nobody can": ([-np.inf, -np.inf], [0, 0]),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("gamma", [0.001, 0.4, 0.77, 1.0])
def test_equals_the_reference_and_keeps_to_room_and_budget(pool: str, gamma: float) -> None:
    scores, ranks = POOLS[pool]
    for seed in range(25):
        got = allocate(np.array(scores), np.array(ranks), gamma, np.random.default_rng(seed))
        uniform = np.random.default_rng(seed).random(1000).tolist()
        assert got.counts.tolist() == reference(scores, ranks, gamma, uniform)
        room = sum(ranks[e] for e in got.candidates)
        assert (got.counts <= np.array(ranks)).all()
        if room:
            assert got.counts.sum() == got.budget == max(1, round(gamma * room))
            assert got.mean_rank == room / len(got.candidates)
        else:
            assert got.budget == 0


def test_where_shares_underflow_the_rest_goes_by_rank_of_score() -> None:
    got = allocate(np.array([1.0, 5000.0, 3.0, 2.0]), np.array([4, 3, 2, 4]), 9 / 13, np.random.default_rng(0))
    assert got.budget == 9
    assert got.counts.tolist() == [0, 3, 2, 4]
    assert softmax(np.array([1.0, 5000.0])).tolist() == [0.0, 1.0]


def test_all_is_handed_out_at_gamma_one() -> None:
    ranks = np.array([3, 1, 8, 2])
    got = allocate(np.array([9.0, 0.5, 0.1, 700.0]), ranks, 1.0, np.random.default_rng(5))
    assert got.counts.tolist() == ranks.tolist()


def test_draws_follow_the_capped_multinomial() -> None:
    # Two draws, pi = (2/3, 1/3), room 1 and 2: P(o_0 = 1) = 1 - P(both draws are 1) = 8/9.
    scores, ranks = np.array([1.0 + math.log(2), 1.0]), np.array([1, 2])
    seen = Counter(
        tuple(allocate(scores, ranks, 2 / 3, np.random.default_rng(seed)).counts.tolist()) for seed in range(4000)
    )
    assert set(seen) == {(1, 1), (0, 2)}
    assert seen[1, 1] / 4000 == pytest.approx(8 / 9, abs=0.02)


def test_without_caps_the_mean_is_budget_times_share() -> None:
    scores, ranks = np.array([0.1, 1.1, 0.6]), np.array([100, 100, 100])
    counts = np.mean([allocate(scores, ranks, 0.1, np.random.default_rng(seed)).counts for seed in range(2000)], axis=0)
    assert counts == pytest.approx(30 * softmax(scores), rel=0.03)


def test_large_pools_are_drawn_at_once() -> None:
    generator = np.random.default_rng(0)
    scores, ranks = generator.random(500) * 3, generator.integers(1, 65, size=500)
    got = allocate(scores, ranks, 0.4, np.random.default_rng(1))
    uniform = np.random.default_rng(1).random(20_000).tolist()
    assert got.counts.tolist() == reference(scores.tolist(), ranks.tolist(), 0.4, uniform)
