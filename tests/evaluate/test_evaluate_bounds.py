"""Distances and bounds against dense covariances, and against sampling in few dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from hub_router.evaluate.bounds import (
    ALPHAS,
    bhattacharyya,
    bhattacharyya_distances,
    kl,
    kl_divergences,
    shifted_error_bound,
    top_k_error_bound,
)
from hub_router.gaussian import Gaussian, fit, log_density, stack

EPSILON = 0.3


def near_gaussian(seed: int, m: int, width: int = 3, spread: float = 0.5) -> Gaussian:
    generator = np.random.default_rng(seed)
    return fit(generator.normal(size=width) * 0.4 + generator.normal(size=(m, width)) * spread)


def dense(gaussian: Gaussian, epsilon: float) -> np.ndarray:
    return gaussian.factors.T @ gaussian.factors + epsilon * np.eye(gaussian.mean.shape[0])


def draws(gaussian: Gaussian, count: int, epsilon: float = EPSILON) -> np.ndarray:
    generator = np.random.default_rng(11)
    return generator.multivariate_normal(gaussian.mean, dense(gaussian, epsilon), size=count)


def log_densities(z: np.ndarray, gaussians: Sequence[Gaussian], epsilon: float = EPSILON) -> np.ndarray:
    """Dense, for many z at once: ``(N, E)``."""
    columns = []
    for each in gaussians:
        covariance, offsets = dense(each, epsilon), z - each.mean
        distances = (offsets * np.linalg.solve(covariance, offsets.T).T).sum(axis=1)
        volume = np.linalg.slogdet(covariance)[1]
        columns.append(-0.5 * (z.shape[1] * math.log(2 * math.pi) + volume + distances))
    return np.stack(columns, axis=1)


PAIRS = [(4, 5, 6), (2, 9, 6), (1, 3, 4), (9, 9, 3), (1, 1, 5)]


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
@pytest.mark.parametrize(("m", "other", "width"), PAIRS)
def test_distances_equal_the_dense_formulas(m: int, other: int, width: int, epsilon: float) -> None:
    p, q = near_gaussian(1, m, width), near_gaussian(2, other, width)
    S_p, S_q, offset = dense(p, epsilon), dense(q, epsilon), p.mean - q.mean
    logs = [np.linalg.slogdet(S)[1] for S in (S_p, S_q, (S_p + S_q) / 2)]
    # Lemma 1
    B = offset @ np.linalg.inv((S_p + S_q) / 2) @ offset / 8 + (logs[2] - (logs[0] + logs[1]) / 2) / 2
    assert bhattacharyya(p, q, epsilon) == pytest.approx(B, rel=1e-7)
    trace = np.trace(np.linalg.inv(S_q) @ S_p)
    divergence = (trace - width + offset @ np.linalg.inv(S_q) @ offset + logs[1] - logs[0]) / 2
    assert kl(p, q, epsilon) == pytest.approx(divergence, rel=1e-7)


def test_a_gaussian_is_at_no_distance_from_itself() -> None:
    p = near_gaussian(3, 5, 8)
    assert bhattacharyya(p, p, 1e-5) == pytest.approx(0, abs=1e-9)
    assert kl(p, p, 1e-5) == pytest.approx(0, abs=1e-9)


def test_distances_are_those_of_sampling() -> None:
    p, q = near_gaussian(1, 3), near_gaussian(2, 5)
    log_p, log_q = log_densities(draws(p, 400_000), [p, q]).T
    assert math.exp(-bhattacharyya(p, q, EPSILON)) == pytest.approx(np.exp((log_q - log_p) / 2).mean(), rel=5e-3)
    assert kl(p, q, EPSILON) == pytest.approx((log_p - log_q).mean(), rel=2e-2)


def test_matrices_hold_every_pair() -> None:
    pool = [near_gaussian(seed, 4) for seed in range(4)]
    B, D = bhattacharyya_distances(pool, EPSILON), kl_divergences(pool, EPSILON)
    for i in range(4):
        for j in range(4):
            assert B[i, j] == pytest.approx(bhattacharyya(pool[i], pool[j], EPSILON), abs=1e-12)
            assert D[i, j] == pytest.approx(kl(pool[i], pool[j], EPSILON), abs=1e-12)
    assert np.array_equal(B, B.T)
    assert not np.allclose(D, D.T)


def miss_rate(z: np.ndarray, pool: Sequence[Gaussian], own: int, k: int) -> float:
    """How often ``own`` is not among the k most likely."""
    logs = log_density(z, *stack(pool), EPSILON)
    return float(((logs >= logs[:, [own]]).sum(axis=1) - 1 >= k).mean())


@pytest.mark.parametrize("k", [1, 2])
def test_theorem_1_bounds_the_misses(k: int) -> None:
    pool = [near_gaussian(seed, 5, spread=0.4) for seed in range(5)]
    # Further apart, so that the bound says something.
    pool = [Gaussian(3 * each.mean, each.factors, each.samples) for each in pool]
    bound = top_k_error_bound(bhattacharyya_distances(pool, EPSILON), k)
    for own in range(5):
        expected = sum(math.exp(-bhattacharyya(pool[own], other, EPSILON)) for other in pool if other is not pool[own])
        assert bound[own] == pytest.approx(expected / k)  # Eq. 5
        assert miss_rate(draws(pool[own], 20_000), pool, own, k) <= bound[own]
    assert bound.min() < 0.9


def nearest_first(q: Gaussian, *others: Gaussian) -> list[Gaussian]:
    return sorted(others, key=lambda other: kl(q, other, EPSILON))


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_lemma_3_is_the_moment_and_the_main_text_is_not(alpha: float) -> None:
    q = near_gaussian(5, 4, spread=0.2)
    near, far = nearest_first(q, near_gaussian(1, 6, spread=0.7), near_gaussian(2, 5, spread=0.6))
    log_near, log_far = log_densities(draws(q, 400_000), [near, far]).T
    sampled = np.exp(alpha * (log_far - log_near)).mean()  # E_q[(p_j / p_i*)^alpha], proof of Theorem 2
    # With two Gaussians and k = 1 the bound is a single moment.
    found = shifted_error_bound(q, [far, near], EPSILON, k=1, alphas=[alpha])
    assert found.nearest == 1
    assert found.violating == ()
    assert found.bound == pytest.approx(sampled, rel=1e-2)
    # Eq. 6 with its C_alpha as printed beside it, -1/2 log|M| where the appendix has -1/2 log|S_q|.
    S_q, S_j, S_i = (dense(each, EPSILON) for each in (q, far, near))
    M = np.linalg.inv(S_q) + alpha * (np.linalg.inv(S_j) - np.linalg.inv(S_i))
    printed = found.bound * math.exp((np.linalg.slogdet(S_q)[1] - np.linalg.slogdet(M)[1]) / 2)
    assert abs(printed / sampled - 1) > 0.5


def test_theorem_2_equals_its_dense_formula() -> None:
    alpha, epsilon = 0.3, 0.3
    q = near_gaussian(5, 4, 6, spread=0.2)
    pool = [near_gaussian(seed, 3 + seed, 6, spread=0.7) for seed in range(4)]
    nearest = min(range(4), key=lambda i: kl(q, pool[i], epsilon))
    inverse = {each: np.linalg.inv(dense(each, epsilon)) for each in (q, *pool)}
    log_det = {each: np.linalg.slogdet(dense(each, epsilon))[1] for each in (q, *pool)}
    near, total = pool[nearest], 0.0
    for j, other in enumerate(pool):
        if j == nearest:
            continue
        M = inverse[q] + alpha * inverse[other] - alpha * inverse[near]
        h = inverse[q] @ q.mean + alpha * inverse[other] @ other.mean - alpha * inverse[near] @ near.mean
        K = q.mean @ inverse[q] @ q.mean / 2
        K += alpha / 2 * (other.mean @ inverse[other] @ other.mean - near.mean @ inverse[near] @ near.mean)
        C = math.exp(-alpha / 2 * log_det[other] + alpha / 2 * log_det[near] - log_det[q] / 2)  # Lemma 3
        total += C * np.linalg.det(M) ** -0.5 * math.exp(h @ np.linalg.inv(M) @ h / 2 - K)  # Eq. 6
    found = shifted_error_bound(q, pool, epsilon, k=2, alphas=[alpha])
    assert found.nearest == nearest
    assert found.bound == pytest.approx(total / 2, rel=1e-9)


def test_theorem_2_bounds_the_misses_of_an_unknown_task() -> None:
    pool = [near_gaussian(seed, 5, spread=0.5) for seed in range(4)]
    pool = [Gaussian(4 * each.mean, each.factors, each.samples) for each in pool]
    q = Gaussian(pool[2].mean + 0.1, pool[2].factors * 0.7, 5)
    found = shifted_error_bound(q, pool, EPSILON, k=1)
    assert found.nearest == 2
    assert miss_rate(draws(q, 20_000), pool, 2, 1) <= found.bound < 1


def test_theorem_2_for_a_known_task_is_theorem_1() -> None:
    p, other = near_gaussian(1, 4), near_gaussian(2, 4)
    found = shifted_error_bound(p, [other, p], EPSILON, k=1, alphas=[0.5])
    assert found.nearest == 1
    assert found.bound == pytest.approx(math.exp(-bhattacharyya(p, other, EPSILON)), rel=1e-10)


def test_no_bound_where_the_moment_is_infinite() -> None:
    # q is as wide as j and the nearest is narrow: the ratio p_j / p_i* grows faster than q falls.
    wide = Gaussian(np.zeros(2), 2.0 * np.eye(2), 9)
    narrow, far = Gaussian(np.zeros(2), 0.5 * np.eye(2), 9), Gaussian(np.full(2, 50.0), 2.0 * np.eye(2), 9)
    found = shifted_error_bound(wide, [far, narrow], EPSILON, k=1, alphas=[1.0])
    assert found.nearest == 1
    assert found.violating == (0,)
    assert math.isinf(found.bound)
    # A small alpha leaves M_alpha positive.
    found = shifted_error_bound(wide, [far, narrow], EPSILON, k=1, alphas=[1.0, 0.01])
    assert (found.violating, found.alpha) == ((), 0.01)
    assert math.isfinite(found.bound)


def test_the_best_alpha_is_taken() -> None:
    q, *pool = (near_gaussian(seed, 5, 6) for seed in range(5))
    each = [shifted_error_bound(q, pool, EPSILON, k=2, alphas=[alpha]) for alpha in ALPHAS]
    best = min(each, key=lambda found: found.bound)
    assert ALPHAS[-1] < best.alpha < ALPHAS[0]
    found = shifted_error_bound(q, pool, EPSILON, k=2)
    assert (found.alpha, found.nearest) == (best.alpha, best.nearest)
    assert found.bound == pytest.approx(best.bound, rel=1e-12)
