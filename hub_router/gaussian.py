"""Gaussians of an adapter's sample embeddings: fitted from few vectors, exact in many dimensions, never D x D.

A covariance of m samples has rank m - 1 at most. With ``F (K, D)`` its eigenvectors, each times the square root of its
eigenvalue, it is ``F^T F``, and every density here is that of ``N(mean, F^T F + epsilon I)``, Eq. 3 of
`HiLoRA <https://arxiv.org/abs/2510.12266>`_. The ridge epsilon belongs to whoever scores: one fit serves every epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of an adapter's sample embeddings.

    Args:
        mean (np.ndarray): float64 ``(D,)``.
        factors (np.ndarray): float64 ``(K, D)`` with K <= min(m - 1, D): orthogonal eigenvectors of the sample
            covariance (divisor m - 1), each times the square root of its eigenvalue, largest first. Rows may be zero.
        samples (int): number m of vectors that it was fitted to.
    """

    mean: np.ndarray
    factors: np.ndarray
    samples: int


def fit(vectors: np.ndarray) -> Gaussian:
    """Mean and low-rank covariance of a few vectors.

    Args:
        vectors (np.ndarray): ``(m, D)``, m at least 1; computed in float64.

    Returns:
        Gaussian: without factors where m = 1.

    Raises:
        ValueError: not a matrix with at least one row and column, or not finite.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"sample embeddings have shape {rows.shape}, expected (m, D) with m and D at least 1")
    if not np.isfinite(rows).all():
        raise ValueError("sample embeddings hold values that are not finite, expected finite ones")
    count, dimensions = rows.shape
    mean = rows.mean(axis=0)
    # Centring takes one dimension away: the m-th singular value is rounding.
    kept = min(count - 1, dimensions)
    if kept == 0:
        return Gaussian(mean, np.zeros((0, dimensions)), count)
    _, lengths, axes = np.linalg.svd((rows - mean) / math.sqrt(count - 1), full_matrices=False)
    return Gaussian(mean, lengths[:kept, None] * axes[:kept], count)


def stack(gaussians: Sequence[Gaussian]) -> tuple[np.ndarray, np.ndarray]:
    """Many Gaussians as two arrays; rows of zeros fill up where one has fewer factors and change no density.

    Args:
        gaussians (Sequence[Gaussian]): at least one, all of the same width D.

    Returns:
        tuple[np.ndarray, np.ndarray]: means ``(E, D)`` and factors ``(E, K, D)`` with the largest K, float64.

    Raises:
        ValueError: none were given, or they differ in width.
    """
    widths = sorted({gaussian.mean.shape[0] for gaussian in gaussians})
    if len(widths) != 1:
        raise ValueError(f"Gaussians have {widths} dimensions, expected one and the same number")
    factors = np.zeros((len(gaussians), max(each.factors.shape[0] for each in gaussians), widths[0]))
    for place, gaussian in zip(factors, gaussians, strict=True):
        place[: gaussian.factors.shape[0]] = gaussian.factors
    return np.stack([gaussian.mean for gaussian in gaussians]).astype(np.float64), factors


def log_density(vectors: np.ndarray, means: np.ndarray, factors: np.ndarray, epsilon: float) -> np.ndarray:
    """Natural logarithm of ``N(z; mean_e, F_e^T F_e + epsilon I)``, for every z and e.

    Each z is computed by itself, so that its densities are the same bits whichever vectors stand beside it.

    Args:
        vectors (np.ndarray): z ``(B, D)``.
        means (np.ndarray): ``(E, D)``.
        factors (np.ndarray): ``(E, K, D)``, whose rows need not be orthogonal and may be zero.
        epsilon (float): ridge, above 0.

    Returns:
        np.ndarray: float64 ``(B, E)``.
    """
    vectors, means, factors = (np.asarray(each, dtype=np.float64) for each in (vectors, means, factors))
    variances, turns = np.linalg.eigh(factors @ factors.swapaxes(-1, -2))  # [E, K], [E, K, K]
    densities = np.empty((vectors.shape[0], means.shape[0]))
    for vector, out in zip(vectors, densities, strict=True):
        offsets = vector - means  # [E, D]
        lengths = np.square(offsets).sum(axis=-1)
        projections = turns.swapaxes(-1, -2) @ (factors @ offsets[..., None])  # [E, K, 1]
        out[:] = woodbury(lengths, np.square(projections[..., 0]), variances, epsilon, means.shape[1])
    return densities


def woodbury(
    lengths: np.ndarray, squares: np.ndarray, variances: np.ndarray, epsilon: float, dimensions: int
) -> np.ndarray:
    """The logarithm of a density ``N(z; mean, F^T F + epsilon I)`` from a few numbers that do not depend on epsilon.

    With ``F F^T = U diag(variances) U^T`` the inverse of the covariance is
    ``(I - F^T U diag(1 / (variances + epsilon)) U^T F) / epsilon``.

    Args:
        lengths (np.ndarray): ``||z - mean||^2`` ``(...,)``.
        squares (np.ndarray): squared elements of ``U^T F (z - mean)`` ``(..., K)``.
        variances (np.ndarray): eigenvalues of ``F F^T`` ``(..., K)``, broadcastable to ``squares``; rounding may
            leave those that are 0 a little below.
        epsilon (float): ridge, above 0.
        dimensions (int): D.

    Returns:
        np.ndarray: ``(...,)``.
    """
    ridged = np.maximum(variances, 0.0) + epsilon
    distances = (lengths - (squares / ridged).sum(axis=-1)) / epsilon
    volumes = np.log(ridged).sum(axis=-1) + (dimensions - ridged.shape[-1]) * math.log(epsilon)
    return -0.5 * (dimensions * math.log(2.0 * math.pi) + volumes + distances)
