"""Gaussians in a third or a fortieth of their size, to tell which few of many are worth reading in full.

With u_k the unit eigenvectors of an adapter's covariance and v_k their eigenvalues, -2 epsilon times the logarithm of
its density at z is, but for a constant, the distance

    ||z - mean||^2 - sum_k v_k / (v_k + epsilon) (u_k . (z - mean))^2 + epsilon sum_k log(1 + v_k / epsilon)

The second term decides between adapters whose means are equally near, and it takes most of a Gaussian's bytes. A fine
sketch holds u_k in 8 bits, a coarse one the first of them along the few axes in which samples of one task differ most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hub_router.store.gaussians import GaussianRows

AXES_SHARE = 8
AXES_LEAST = 32
COARSE_FACTORS = 8
_LEVELS = 127
# Numbers in a product: larger ones go to several threads and to memory that is new each time.
_PRODUCT = 100_000


@dataclass(frozen=True, eq=False)
class Sketches:
    """Sketches of N adapters along P axes; factors that an adapter lacks are zeros and count for nothing.

    Args:
        directions (np.ndarray): u_k, int8 ``(N, K, P)``.
        numbers (np.ndarray): float32 ``(N, 3, K)``: what a step of a direction is worth, the product of the direction
            and the mean, and v_k.
    """

    directions: np.ndarray
    numbers: np.ndarray

    @property
    def factors(self) -> int:
        """K."""
        return int(self.directions.shape[1])


def axes_count(dimension: int) -> int:
    """Number P of axes of a coarse sketch for embeddings of D dimensions."""
    return min(dimension, max(AXES_LEAST, dimension // AXES_SHARE))


def principal_axes(pieces: Iterable[GaussianRows], dimension: int) -> np.ndarray:
    """The axes along which samples of one task differ most, over all tasks.

    Args:
        pieces (Iterable[GaussianRows]): a choice of Gaussians.
        dimension (int): D.

    Returns:
        np.ndarray: float32 ``(D, P)``, orthonormal columns.
    """
    total = np.zeros((dimension, dimension))
    for piece in pieces:
        rows = piece.factors.reshape(-1, dimension)
        total += rows.T @ rows
    _, vectors = np.linalg.eigh(total)
    return np.ascontiguousarray(vectors[:, ::-1][:, : axes_count(dimension)], dtype=np.float32)


def sketch(rows: GaussianRows, axes: np.ndarray | None, into: Sketches) -> None:
    """Writes the sketches of Gaussians.

    Args:
        rows (GaussianRows): of N adapters; what they have beyond K factors is left out.
        axes (np.ndarray | None): float32 ``(D, P)``; None where P is D and the axes are the embeddings' own.
        into (Sketches): of N adapters, all zeros.
    """
    factors, means = rows.factors[:, : into.factors], rows.means
    variances = np.square(factors).sum(axis=-1)  # [N, K]
    directions, means = (factors, means) if axes is None else (factors @ axes, means @ axes)
    directions = directions / np.where(variances > 0, np.sqrt(variances), 1)[..., None]
    steps = np.abs(directions).max(axis=-1, initial=0.0) / _LEVELS  # [N, K]
    rounded = np.rint(directions / np.where(steps > 0, steps, 1)[..., None])
    offsets = steps * (rounded @ means[..., None])[..., 0]
    into.directions[:, : factors.shape[1]] = rounded
    into.numbers[:, :, : factors.shape[1]] = np.stack([steps, offsets, variances], axis=1)


def estimates(
    sketches: Sketches, places: np.ndarray, lengths: np.ndarray, query: np.ndarray, epsilon: float
) -> np.ndarray:
    """Estimated distances, see the head of this file.

    Args:
        sketches (Sketches): of all adapters.
        places (np.ndarray): which of them, int64 ``(N,)``.
        lengths (np.ndarray): their ``||z - mean||^2``, float32 ``(N,)``.
        query (np.ndarray): z along the axes, float32 ``(P,)``.
        epsilon (float): ridge, above 0.

    Returns:
        np.ndarray: float32 ``(N,)``.
    """
    products = np.empty((len(places), sketches.factors), dtype=np.float32)
    block = max(1, _PRODUCT // (sketches.factors * len(query)))
    for start in range(0, len(places), block):
        directions = sketches.directions[places[start : start + block]].reshape(-1, len(query))
        products[start : start + block].reshape(-1)[:] = directions.astype(np.float32) @ query
    steps, offsets, variances = sketches.numbers[places].swapaxes(0, 1)  # [N, K] each
    explained = np.square(products * steps - offsets) * (variances / (variances + epsilon))
    return lengths - explained.sum(axis=-1) + epsilon * np.log(1 + variances / epsilon).sum(axis=-1)
