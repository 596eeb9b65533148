"""Gaussians in a fifteenth of their size, to tell which few of many are worth reading in full.

With u_k the unit eigenvectors of an adapter's covariance and v_k their eigenvalues, -2 epsilon times the logarithm of
its density at z is, but for a constant, the distance

    ||z - mean||^2 - sum_k v_k / (v_k + epsilon) (u_k . (z - mean))^2 + epsilon sum_k log(1 + v_k / epsilon)

The second term decides between adapters whose means are equally near, and it takes most of a Gaussian's bytes. Its
products are taken in the few axes along which samples of one task differ most, with u_k in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hub_router.store.gaussians import GaussianRows

# Of 768 axes, 192 hold about four fifths of what tells two inputs of one task apart.
AXES_SHARE = 4
_AXES_LEAST = 32
_LEVELS = 127


def axes_count(dimension: int) -> int:
    """Number P of axes for embeddings of D dimensions."""
    return min(dimension, max(_AXES_LEAST, dimension // AXES_SHARE))


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


def sketch_type(factors: int, axes: int) -> np.dtype[np.void]:
    """Layout of one adapter's sketch: K directions of P bytes, and what belongs to each."""
    parts = [("directions", "i1", (factors, axes))]
    return np.dtype(parts + [(name, "<f4", (factors,)) for name in ("scales", "offsets", "variances")])


def sketch(rows: GaussianRows, axes: np.ndarray, layout: np.dtype[np.void]) -> np.ndarray:
    """Sketches of Gaussians.

    Args:
        rows (GaussianRows): with at most the layout's K factors each.
        axes (np.ndarray): float32 ``(D, P)``.
        layout (np.dtype): from :func:`sketch_type`.

    Returns:
        np.ndarray: of the layout, ``(N,)``; factors that an adapter lacks are zeros and count for nothing.
    """
    made = np.zeros(len(rows.owners), dtype=layout)
    count = rows.factors.shape[1]
    variances = np.square(rows.factors).sum(axis=-1)  # [N, K]
    directions = rows.factors @ axes  # [N, K, P]
    directions /= np.where(variances > 0, np.sqrt(variances), 1)[..., None]
    scales = np.abs(directions).max(axis=-1, initial=0.0) / _LEVELS  # [N, K]
    rounded = np.rint(directions / np.where(scales > 0, scales, 1)[..., None])
    means = (rows.means @ axes)[..., None]  # [N, P, 1]
    made["directions"][:, :count] = rounded
    made["scales"][:, :count] = scales
    made["offsets"][:, :count] = scales * (rounded @ means)[..., 0]
    made["variances"][:, :count] = variances
    return made


def estimates(sketches: np.ndarray, lengths: np.ndarray, query: np.ndarray, epsilon: float) -> np.ndarray:
    """Estimated distances, see the head of this file.

    Args:
        sketches (np.ndarray): of a :func:`sketch_type`, ``(N,)``.
        lengths (np.ndarray): ``||z - mean||^2``, float32 ``(N,)``.
        query (np.ndarray): z along the axes, float32 ``(P,)``.
        epsilon (float): ridge, above 0.

    Returns:
        np.ndarray: float32 ``(N,)``.
    """
    shape = sketches["directions"].shape
    directions = sketches["directions"].reshape(-1, shape[-1]).astype(np.float32)
    products = (directions @ query).reshape(shape[:-1]) * sketches["scales"] - sketches["offsets"]  # [N, K]
    variances = sketches["variances"]
    explained = (np.square(products) * (variances / (variances + epsilon))).sum(axis=-1)
    return lengths - explained + epsilon * np.log1p(variances / epsilon).sum(axis=-1)
