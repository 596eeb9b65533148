"""Vectors as the database holds them: float32, little-endian, without a header."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STORED = np.dtype("<f4")


def to_bytes(vector: np.ndarray) -> bytes:
    """Bytes of a vector ``(D,)`` of any float dtype."""
    return np.ascontiguousarray(vector, dtype=_STORED).tobytes()


def from_bytes(stored: bytes) -> np.ndarray:
    """The float32 vector ``(D,)`` of its bytes, writeable."""
    return np.frombuffer(stored, dtype=_STORED).astype(np.float32)


def view_of(stored: bytes) -> np.ndarray:
    """The float32 vector ``(D,)`` of its bytes, not to be written to."""
    return np.frombuffer(stored, dtype=_STORED)


def matrix_from_bytes(stored: Sequence[bytes], width: int) -> np.ndarray:
    """Vectors of one width stacked to float32 ``(N, width)``, writeable.

    Args:
        stored (Sequence[bytes]): one entry per row.
        width (int): D, needed where there are no rows.

    Returns:
        np.ndarray: rows in the order given.
    """
    return (
        np.frombuffer(bytearray().join(stored), dtype=_STORED)
        .astype(np.float32, copy=False)
        .reshape(len(stored), width)
    )
