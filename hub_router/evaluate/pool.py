"""What the samples of a pool's tasks say before any model runs: HiLoRA's epsilon, distances, and bounds on its errors.

Everything follows from the embedded samples, so no adapter and no base model is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hub_router.errors import HubRouterError
from hub_router.evaluate.bounds import (
    bhattacharyya_distances,
    kl_divergences,
    shifted_error_bound,
    top_k_error_bound,
)
from hub_router.evaluate.calibration import Calibration, calibrate
from hub_router.gaussian import Gaussian, fit

_TOP_K = 3


@dataclass(frozen=True)
class TaskBounds:
    """How well inputs of one adapter's task are told from those of the others.

    Args:
        adapter (str): name in the pool.
        samples (int): number of embedded samples of its task.
        error_bound (float): Theorem 1, on how often the adapter is not among the top k for inputs of its own task.
        nearest (str): i* of Theorem 2, the adapter that stands for the task best where its own is left out of the pool.
        divergence (float): KL(own || nearest) in nats.
        unseen_bound (float): Theorem 2, on how often i* is not among the top k then; infinite where there is no bound.
        alpha (float): the exponent that gives it.
        unbounded_by (tuple[str, ...]): adapters for which M_alpha is not positive definite, so that there is none.
    """

    adapter: str
    samples: int
    error_bound: float
    nearest: str
    divergence: float
    unseen_bound: float
    alpha: float
    unbounded_by: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PoolReport:
    """All of it.

    Args:
        adapters (tuple[str, ...]): names in pool order, rows and columns of the matrices.
        encoder (str): sentence encoder that embedded the samples.
        calibration (Calibration): of epsilon, by leave-one-out.
        epsilon (float): ridge on the covariances below.
        top_k (int): k of the bounds.
        bhattacharyya (np.ndarray): distances in nats ``(E, E)``.
        kl (np.ndarray): KL(row || column) in nats ``(E, E)``.
        tasks (tuple[TaskBounds, ...]): in pool order.
    """

    adapters: tuple[str, ...]
    encoder: str
    calibration: Calibration
    epsilon: float
    top_k: int
    bhattacharyya: np.ndarray
    kl: np.ndarray
    tasks: tuple[TaskBounds, ...]

    def nearest_pairs(self, count: int) -> list[tuple[int, int]]:
        """The pairs at the smallest Bhattacharyya distance.

        Args:
            count (int): at most this many.

        Returns:
            list[tuple[int, int]]: pool positions, the nearest pair first.
        """
        above, below = np.triu_indices(len(self.adapters), k=1)
        order = np.argsort(self.bhattacharyya[above, below], kind="stable")[:count]
        return [(int(above[number]), int(below[number])) for number in order]


def report_pool(
    samples: Mapping[str, np.ndarray], encoder: str, *, epsilon: float | None = None, top_k: int | None = None
) -> PoolReport:
    """Calibrate HiLoRA for a pool, and bound its errors there.

    Args:
        samples (Mapping[str, np.ndarray]): unit vectors ``(m, D)`` of each adapter's task; m at least 3.
        encoder (str): that embedded them.
        epsilon (float | None): ridge for distances and bounds; default the calibrated one.
        top_k (int | None): k of the bounds, fewer than the adapters; default 3, or what the pool allows.

    Returns:
        PoolReport: by adapter, in the order given.

    Raises:
        HubRouterError: fewer than two adapters, or adapters with fewer than three samples (lists every one); or an
            epsilon or k out of range.
    """
    if (epsilon is not None and not 0 < epsilon < np.inf) or (top_k is not None and top_k < 1):
        raise HubRouterError(f"got epsilon {epsilon} and top_k {top_k}, expected an epsilon above 0 and at least 1")
    calibration = calibrate(samples)
    if top_k is not None and top_k >= len(samples):
        raise HubRouterError(
            f"got top_k {top_k} for a pool of {len(samples)} adapters, all of which are among the best {top_k}; "
            f"expected at most {len(samples) - 1}"
        )
    top_k = min(_TOP_K, len(samples) - 1) if top_k is None else top_k
    chosen = calibration.chosen.epsilon if epsilon is None else epsilon
    gaussians = [fit(vectors) for vectors in samples.values()]
    distances, divergences = bhattacharyya_distances(gaussians, chosen), kl_divergences(gaussians, chosen)
    errors = top_k_error_bound(distances, top_k)
    names = tuple(samples)
    return PoolReport(
        adapters=names,
        encoder=encoder,
        calibration=calibration,
        epsilon=chosen,
        top_k=top_k,
        bhattacharyya=distances,
        kl=divergences,
        tasks=tuple(
            _bounds(names, gaussians, position, float(errors[position]), divergences, chosen, top_k)
            for position in range(len(names))
        ),
    )


def _bounds(
    names: Sequence[str],
    gaussians: Sequence[Gaussian],
    own: int,
    error_bound: float,
    divergences: np.ndarray,
    epsilon: float,
    top_k: int,
) -> TaskBounds:
    """Both theorems for one task; the second with its own Gaussian as q, out of the pool."""
    rest = [position for position in range(len(names)) if position != own]
    found = shifted_error_bound(gaussians[own], [gaussians[each] for each in rest], epsilon, k=top_k)
    nearest = rest[found.nearest]
    return TaskBounds(
        adapter=names[own],
        samples=gaussians[own].samples,
        error_bound=error_bound,
        nearest=names[nearest],
        divergence=float(divergences[own, nearest]),
        unseen_bound=found.bound,
        alpha=found.alpha,
        unbounded_by=tuple(names[rest[each]] for each in found.violating),
    )
