"""FAISS indexes of numbered vectors: exact over few, cells around k-means centroids for many."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np


def laid_out(rows: np.ndarray, numbers: np.ndarray, metric: int, exact_rows: int, finer: float = 0.0) -> Any:
    """An index of all rows.

    Args:
        rows (np.ndarray): float32 ``(N, D)``.
        numbers (np.ndarray): what search gives for each row, int64 ``(N,)``.
        metric (int): ``faiss.METRIC_INNER_PRODUCT`` or ``faiss.METRIC_L2``.
        exact_rows (int): up to so many rows are compared one by one.
        finer (float): how often the number of cells, about the square root of that of rows, is doubled.

    Returns:
        Any: FAISS index.
    """
    count, dimension = rows.shape
    flat = faiss.IndexFlat(dimension, metric)
    vectors: Any
    if count <= exact_rows:
        vectors = faiss.IndexIDMap2(flat)
    else:
        cells = 2 ** round(np.log2(count) / 2 + finer)
        # Half the bytes at errors below 1e-4; ranking scores what is found anew.
        half = faiss.ScalarQuantizer.QT_fp16
        vectors = faiss.IndexIVFScalarQuantizer(flat, dimension, cells, half, metric, False)
        vectors.cp.niter, vectors.cp.seed, vectors.cp.min_points_per_centroid = 8, 0, 1
        picked = np.random.default_rng(0).choice(count, min(count, 40 * cells), replace=False)
        vectors.train(rows[np.sort(picked)])
    vectors.add_with_ids(rows, numbers)
    return vectors


def look_up(
    vectors: Any, query: np.ndarray, limit: int, probed: int, among: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows, best first.

    Args:
        vectors (Any): from :func:`laid_out`.
        query (np.ndarray): float32 ``(D,)``.
        limit (int): at most this many.
        probed (int): number of cells that are searched, where there are cells.
        among (np.ndarray | None): numbers to which the search is confined; every one of them is then compared.

    Returns:
        tuple[np.ndarray, np.ndarray]: numbers int64 ``(N,)``, products or squared distances float32 ``(N,)``.
    """
    cells = getattr(vectors, "nlist", 0)
    options: dict[str, Any] = {"nprobe": cells if among is not None else min(cells, probed)} if cells else {}
    if among is not None:
        bits = _bitmap(among)
        options["sel"] = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
    parameters = faiss.SearchParametersIVF(**options) if cells else faiss.SearchParameters(**options)
    scores, numbers = vectors.search(query[None], min(limit, vectors.ntotal), params=parameters)
    found = numbers[0] >= 0
    return numbers[0][found], scores[0][found]


def remove(vectors: Any, numbers: np.ndarray) -> None:
    """Takes rows out of an index; numbers that it does not hold are passed over."""
    vectors.remove_ids(faiss.IDSelectorBatch(len(numbers), faiss.swig_ptr(numbers)))


def _bitmap(numbers: np.ndarray) -> np.ndarray:
    """One bit per number, set for those given."""
    wanted = np.zeros(int(numbers.max()) + 1, dtype=bool)
    wanted[numbers] = True
    return np.packbits(wanted, bitorder="little")
