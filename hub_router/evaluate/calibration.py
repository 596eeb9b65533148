"""HiLoRA's ridge epsilon chosen by held-out samples, and what it does to the number of candidates.

The sign of a score decides who is a candidate (Eq. 4 of `HiLoRA <https://arxiv.org/abs/2510.12266>`_), and the score's
zero point moves with epsilon, the encoder and its width. Calibration looks for the epsilon with which each adapter's
samples, left out of its own Gaussian in turn, score above 0 there and below 0 with all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hub_router.errors import HubRouterError
from hub_router.gaussian import fit, woodbury
from hub_router.routing.allocation import candidate_count

# The epsilon that the paper's published scores follow from.
PUBLISHED = 1e-5
# Ten to a power of ten. Above 1 / (2 pi) no score is positive.
EPSILONS = tuple(float(f"{10 ** (step / 10):.2e}") for step in range(-80, -7))


@dataclass(frozen=True)
class Operating:
    """What one epsilon does.

    Args:
        epsilon (float): ridge on the covariance.
        own_above (float): share of held-out samples that score above 0 with their own adapter.
        others_below (float): share of pairs of a sample and another adapter that score below 0.
        own_first (float): share of held-out samples that score highest with their own adapter.
        candidates_seen (float): mean number of candidates of a held-out sample, its own adapter in the pool.
        candidates_unseen (float): the same with its own adapter left out of the pool.
    """

    epsilon: float
    own_above: float
    others_below: float
    own_first: float
    candidates_seen: float
    candidates_unseen: float

    @property
    def balanced(self) -> float:
        """Balanced accuracy of the sign, between 0 and 1."""
        return (self.own_above + self.others_below) / 2


@dataclass(frozen=True)
class Calibration:
    """The whole curve.

    Args:
        adapters (int): number E of adapters in the pool.
        samples (int): number of samples held out in turn.
        curve (tuple[Operating, ...]): by ascending epsilon, the published one among them.
        chosen (Operating): of the best balanced accuracy; of equals, the one in the middle.
        published (Operating): at :data:`PUBLISHED`.
    """

    adapters: int
    samples: int
    curve: tuple[Operating, ...]
    chosen: Operating
    published: Operating


def calibrate(samples: Mapping[str, np.ndarray], epsilons: Sequence[float] = EPSILONS) -> Calibration:
    """Choose epsilon by leave-one-out over a pool's sample embeddings.

    Args:
        samples (Mapping[str, np.ndarray]): by adapter, unit vectors ``(m, D)``; m at least 3, so that 2 are left.
        epsilons (Sequence[float]): to choose from, each above 0; :data:`PUBLISHED` is always among them.

    Returns:
        Calibration: every epsilon's shares and candidates, and the choice.

    Raises:
        HubRouterError: fewer than two adapters, or adapters with fewer than three samples; lists every one.
    """
    pool = {name: np.asarray(vectors, dtype=np.float64) for name, vectors in samples.items()}
    _check(pool)
    grid = np.array(sorted({*epsilons, PUBLISHED}))
    vectors = np.concatenate(list(pool.values()))  # [N, D]
    own = np.empty((len(grid), vectors.shape[0]))  # [S, N]
    best = np.full_like(own, -np.inf)  # of the other adapters
    above, below = np.zeros_like(own, dtype=np.int64), np.zeros_like(own, dtype=np.int64)
    squares = np.square(vectors).sum(axis=1)
    start = 0
    for rows in pool.values():
        mine = slice(start, start + rows.shape[0])
        scores = _scores(vectors, squares, rows, grid)  # [S, N]
        own[:, mine] = _held_out_scores(rows, grid)
        # A comparison with nan is false, so that the adapter's own samples count nowhere as another's.
        scores[:, mine] = np.nan
        best = np.fmax(best, scores)
        above += scores > 0
        below += scores < 0
        start = mine.stop
    others = len(pool) - 1
    seen = candidate_count(np.maximum(best, own), above + (own > 0), others + 1)
    unseen = candidate_count(best, above, others)
    curve = tuple(
        Operating(float(epsilon), *(float(share) for share in shares))
        for epsilon, *shares in zip(
            grid,
            (own > 0).mean(axis=1),
            below.mean(axis=1) / others,
            (own > best).mean(axis=1),
            seen.mean(axis=1),
            unseen.mean(axis=1),
            strict=True,
        )
    )
    top = max(each.balanced for each in curve)
    equals = [each for each in curve if each.balanced == top]
    published = next(each for each in curve if each.epsilon == PUBLISHED)
    return Calibration(len(pool), vectors.shape[0], curve, equals[(len(equals) - 1) // 2], published)


def _check(pool: Mapping[str, np.ndarray]) -> None:
    if len(pool) < 2:
        raise HubRouterError(f"calibration compares adapters with each other, got {len(pool)}; give at least 2")
    few = [f"{name!r} has {len(vectors)}" for name, vectors in pool.items() if len(vectors) < 3]
    if few:
        raise HubRouterError(
            f"calibration leaves one sample out and needs 2 more of every adapter, but {', '.join(few)}; add some with "
            "hub-router samples add, then hub-router index, or leave these adapters out"
        )


def _scores(vectors: np.ndarray, squares: np.ndarray, rows: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Scores ``(S, N)`` of all vectors, whose squared lengths are ``squares``, with the Gaussian of ``rows``."""
    gaussian, dimensions = fit(rows), vectors.shape[1]
    lengths = squares - 2 * vectors @ gaussian.mean + gaussian.mean @ gaussian.mean
    projections = vectors @ gaussian.factors.T - gaussian.factors @ gaussian.mean  # [N, K]
    variances = np.square(gaussian.factors).sum(axis=1)  # the factors are orthogonal
    densities = [woodbury(lengths, np.square(projections), variances, epsilon, dimensions) for epsilon in grid]
    return np.stack(densities) / dimensions


def _held_out_scores(rows: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Each sample's score ``(S, m)`` with the Gaussian of the m - 1 others.

    Everything follows from the m x m scalar products x_j . x_k of the centred samples. Without sample i the mean is
    ``-x_i / (m - 1)``, sample i lies ``m / (m - 1) x_i`` from it and sample j ``x_j + x_i / (m - 1)``.
    """
    count, dimensions = rows.shape
    centred = rows - rows.mean(axis=0)
    products = centred @ centred.T
    densities = np.empty((len(grid), count))
    for i in range(count):
        rest = np.delete(np.arange(count), i)
        to_i = products[rest, i] / (count - 1)
        length = products[i, i] / (count - 1) ** 2
        # With F the m - 1 centred samples over sqrt(m - 2), F^T F is the covariance without sample i.
        gram = (products[np.ix_(rest, rest)] + to_i[:, None] + to_i + length) / (count - 2)
        variances, turns = np.linalg.eigh(gram)
        projections = turns.T @ (count * (to_i + length)) / math.sqrt(count - 2)
        for place, epsilon in zip(densities, grid, strict=True):
            place[i] = woodbury(count**2 * length, np.square(projections), variances, epsilon, dimensions)
    return densities / dimensions
