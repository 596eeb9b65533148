"""How well a pool's Gaussians tell their tasks apart: distances between them, and HiLoRA's bounds on a wrong choice.

Theorems 1 and 2 of `HiLoRA <https://arxiv.org/abs/2510.12266>`_, for Gaussians of covariance ``F^T F + epsilon I``. All
of it lives in the joint span of the few factors and the differences of means: on what is orthogonal to that, the
covariances are equal and the means agree, so it adds nothing to any of these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hub_router.gaussian import Gaussian

# Each alpha gives a bound, so the smallest of their bounds is one. Small ones keep M_alpha positive definite.
ALPHAS = tuple(2.0**-power for power in range(21))


@dataclass(frozen=True)
class ShiftedBound:
    """Theorem 2 for one target.

    Args:
        nearest (int): position of i*, the Gaussian with the smallest KL(target || i).
        bound (float): on the probability that i* is not among the top k; infinite where :attr:`violating` is not empty.
            It may exceed 1, and then says nothing.
        alpha (float): the exponent that gives this bound.
        violating (tuple[int, ...]): positions j for which M_alpha is not positive definite, whichever alpha is taken,
            so that the moment is infinite.
    """

    nearest: int
    bound: float
    alpha: float
    violating: tuple[int, ...]


def bhattacharyya(p: Gaussian, q: Gaussian, epsilon: float) -> float:
    """Bhattacharyya distance ``B = -log of the integral of sqrt(p q)``, closed form of Lemma 1.

    Args:
        p (Gaussian): one Gaussian.
        q (Gaussian): another of the same width.
        epsilon (float): ridge on both covariances.

    Returns:
        float: in nats; 0 where they are equal.
    """
    (mean_p, mean_q), (cov_p, cov_q) = _in_joint_span((p, q), epsilon)
    middle, offset = (cov_p + cov_q) / 2, mean_p - mean_q
    distance = offset @ np.linalg.solve(middle, offset) / 8
    return float(distance + (_log_det(middle) - (_log_det(cov_p) + _log_det(cov_q)) / 2) / 2)


def kl(p: Gaussian, q: Gaussian, epsilon: float) -> float:
    """Kullback-Leibler divergence ``KL(p || q)``.

    Args:
        p (Gaussian): where the mean is taken.
        q (Gaussian): another of the same width.
        epsilon (float): ridge on both covariances.

    Returns:
        float: in nats.
    """
    (mean_p, mean_q), (cov_p, cov_q) = _in_joint_span((p, q), epsilon)
    offset = mean_p - mean_q
    trace = np.trace(np.linalg.solve(cov_q, cov_p)) - offset.shape[0]
    distance = offset @ np.linalg.solve(cov_q, offset)
    return float((trace + distance + _log_det(cov_q) - _log_det(cov_p)) / 2)


def bhattacharyya_distances(gaussians: Sequence[Gaussian], epsilon: float) -> np.ndarray:
    """B_ij of every pair.

    Args:
        gaussians (Sequence[Gaussian]): of the pool's adapters.
        epsilon (float): ridge on the covariances.

    Returns:
        np.ndarray: ``(E, E)``, symmetric, 0 on the diagonal.
    """
    count = len(gaussians)
    distances = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            distances[i, j] = distances[j, i] = bhattacharyya(gaussians[i], gaussians[j], epsilon)
    return distances


def kl_divergences(gaussians: Sequence[Gaussian], epsilon: float) -> np.ndarray:
    """KL(i || j) of every pair.

    Args:
        gaussians (Sequence[Gaussian]): of the pool's adapters.
        epsilon (float): ridge on the covariances.

    Returns:
        np.ndarray: ``(E, E)``, row i against column j; 0 on the diagonal.
    """
    count = len(gaussians)
    divergences = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            divergences[i, j] = kl(gaussians[i], gaussians[j], epsilon) if i != j else 0.0
    return divergences


def top_k_error_bound(distances: np.ndarray, k: int) -> np.ndarray:
    """Theorem 1: how likely an input of task i does not find adapter i among the k with the best scores, at most.

    ``sum over j != i of exp(-B_ij), over k``. It may exceed 1, and then says nothing.

    Args:
        distances (np.ndarray): B ``(E, E)`` from :func:`bhattacharyya_distances`.
        k (int): how many are chosen, at least 1.

    Returns:
        np.ndarray: ``(E,)``.
    """
    others = ~np.eye(distances.shape[0], dtype=bool)
    return (np.exp(-distances) * others).sum(axis=1) / k


def shifted_error_bound(
    target: Gaussian, gaussians: Sequence[Gaussian], epsilon: float, *, k: int, alphas: Sequence[float] = ALPHAS
) -> ShiftedBound:
    """Theorem 2: how likely an input of an unknown task does not find the nearest adapter among the top k, at most.

    ``sum over j != i* of E_q[(p_j / p_i*)^alpha], over k``, each moment in the closed form of Lemma 3, where
    ``C_alpha = exp(-alpha/2 log|S_j| + alpha/2 log|S_i*| - 1/2 log|S_q|)``. Theorem 2 in the main text prints
    ``-1/2 log|M_alpha|`` in the place of ``-1/2 log|S_q|``, which counts ``|M_alpha|`` twice and does not give the
    moment; the appendix is right.

    Args:
        target (Gaussian): q, of the unknown task's embeddings.
        gaussians (Sequence[Gaussian]): of the pool's adapters.
        epsilon (float): ridge on all covariances.
        k (int): how many are chosen, at least 1.
        alphas (Sequence[float]): exponents of the moment, each above 0 and at most 1; the best one is taken.

    Returns:
        ShiftedBound: infinite where some M_alpha is not positive definite, for every alpha.
    """
    nearest = int(np.argmin([kl(target, each, epsilon) for each in gaussians]))
    others = [j for j in range(len(gaussians)) if j != nearest]
    tried = np.asarray(alphas, dtype=np.float64)
    moments = np.full((len(others), len(tried)), -np.inf)
    for row, j in zip(moments, others, strict=True):
        row[:] = _log_moments(target, gaussians[j], gaussians[nearest], epsilon, tried)
    bounds = np.logaddexp.reduce(moments, axis=0, initial=-np.inf) - np.log(k)  # [A]
    best = int(np.argmin(bounds))
    violating = tuple(j for j, row in zip(others, moments, strict=True) if np.isposinf(row).all())
    with np.errstate(over="ignore"):
        bound = float(np.exp(bounds[best]))
    return ShiftedBound(nearest, bound, float(tried[best]), violating)


def _log_moments(q: Gaussian, p: Gaussian, nearest: Gaussian, epsilon: float, alphas: np.ndarray) -> np.ndarray:
    """``log E_q[(p / nearest)^alpha]`` ``(A,)``, Lemma 3 with the origin at q's mean; infinite unless M_alpha > 0.

    With ``S_q = L L^T`` and ``L^T (S_p^-1 - S_nearest^-1) L = V diag(t) V^T``, M_alpha is ``L^-T V diag(1 + alpha t)
    V^T L^-1``: one decomposition serves every alpha.
    """
    means, (cov_q, cov_p, cov_n) = _in_joint_span((q, p, nearest), epsilon)
    mean_p, mean_n = means[1] - means[0], means[2] - means[0]
    pull_p, pull_n = np.linalg.solve(cov_p, mean_p), np.linalg.solve(cov_n, mean_n)
    L = np.linalg.cholesky(cov_q)
    tilt = L.T @ (np.linalg.inv(cov_p) - np.linalg.inv(cov_n)) @ L
    t, V = np.linalg.eigh((tilt + tilt.T) / 2)
    scales = 1 + alphas[:, None] * t  # [A, n]
    squares = np.square(V.T @ (L.T @ (pull_p - pull_n)))
    K = (mean_p @ pull_p - mean_n @ pull_n) / 2
    fits = scales.min(axis=1, initial=1.0) > 0
    moments = np.full(alphas.shape, np.inf)
    scales, alphas = scales[fits], alphas[fits]
    moments[fits] = (
        alphas / 2 * (_log_det(cov_n) - _log_det(cov_p))
        - np.log(scales).sum(axis=1) / 2
        + np.square(alphas) / 2 * (squares / scales).sum(axis=1)
        - alphas * K
    )
    return moments


def _in_joint_span(gaussians: Sequence[Gaussian], epsilon: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Means, from the first one's, and covariances in coordinates of the span of all factors and differences."""
    origin = gaussians[0].mean
    offsets = [each.mean - origin for each in gaussians]
    rows = np.concatenate([*(each.factors for each in gaussians), np.stack(offsets[1:])])
    basis, _ = np.linalg.qr(rows.T)  # [D, n], orthonormal even where the rows are dependent
    factors = [each.factors @ basis for each in gaussians]
    ridge = epsilon * np.eye(basis.shape[1])
    return [offset @ basis for offset in offsets], [each.T @ each + ridge for each in factors]


def _log_det(matrix: np.ndarray) -> float:
    return float(np.linalg.slogdet(matrix)[1])
