"""Singular values and singular vectors of ``B A`` from its factors; ``B A`` itself is never formed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.records import Spectrum

AMBIGUOUS = 1e-4

# Gram matrices square the condition: a value below this share of |A|_F |B|_F keeps fewer than 5 digits.
_GRAM_SHARE = 1e-5
_BLOCK = 1024
# Rounding of float64 sums: a product that is zero on paper comes out below this share of |A|_F |B|_F.
_ZERO_SHARE = 1e-14


def svd(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin singular value decomposition ``B A = U diag(S) V^T`` (SpectR, Eq. 2, https://arxiv.org/abs/2504.03454).

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: an SVD of r x r suffices. Computed in
    float64.

    Args:
        A (torch.Tensor): down projection ``(r, D_in)``, finite.
        B (torch.Tensor): up projection ``(D_out, r)``, finite, with the scaling if it is to count.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: U ``(D_out, k)``, S ``(k,)`` descending, V ``(D_in, k)``,
        k = min(r, D_in, D_out), in the wider dtype of A and B but at least float32. The largest component of each
        column of V is positive, which fixes the signs.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with torch.no_grad():
        Q_A, R_A = torch.linalg.qr(A.to(torch.float64).T)  # [D_in, k_A], [k_A, r]
        Q_B, R_B = torch.linalg.qr(B.to(torch.float64))  # [D_out, k_B], [k_B, r]
        X, S, Yt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)  # [k_B, k], [k], [k, k_A]
        U, V = Q_B @ X, Q_A @ Yt.T
        peaks = V.gather(0, V.abs().argmax(dim=0, keepdim=True))  # [1, k]
        signs = torch.where(peaks < 0, -1.0, 1.0)
        return (U * signs).to(dtype), S.to(dtype), (V * signs).to(dtype)


def spectrum(module: str, factors: LoraFactors) -> Spectrum:
    """All singular values and the leading right singular vector of one module's update ``s B A``.

    The vector is Arrow's prototype (https://arxiv.org/abs/2405.11157). Both come from r x r Gram matrices in float64,
    which keep at least 5 digits of every value above 1e-5 |A|_F |B|_F, and all that float32 holds of the large ones;
    where a value is smaller, Householder QR of the factors takes over (:func:`svd`'s route).

    Args:
        module (str): module path in the base model.
        factors (LoraFactors): factors and scaling, finite.

    Returns:
        Spectrum: r values, padded with zeros where r exceeds a width. The vector's largest component is positive; it
        is None where B A is zero, and ``ambiguous`` where the two largest values agree to 1e-4 of the larger.
    """
    A, B = _as_numpy(factors.A), _as_numpy(factors.B)
    values, mixing = _by_gram(A, B) or _by_qr(A, B)  # [k], [r]
    padded = np.zeros(factors.rank, dtype=np.float32)  # [r]
    if mixing is None or factors.scaling == 0.0:
        return Spectrum(module, padded, None, ambiguous=False)
    padded[: len(values)] = values * abs(factors.scaling)
    direction = (mixing @ A.astype(np.float64)).astype(np.float32)  # [D_in]
    if -direction.min() > direction.max():
        direction = -direction
    ambiguous = len(values) > 1 and values[0] - values[1] <= AMBIGUOUS * values[0]
    return Spectrum(module, padded, direction, bool(ambiguous))


def spectra(adapter: LoraAdapter) -> Iterator[Spectrum]:
    """The spectrum of every module, one at a time, so that memory stays at one module's float64 copy.

    Args:
        adapter (LoraAdapter): an adapter as read.

    Yields:
        Spectrum: in the order of ``adapter.modules``.
    """
    for module, factors in adapter.modules.items():
        yield spectrum(module, factors)


def _as_numpy(factor: torch.Tensor) -> np.ndarray:
    """A factor as float32 or float64 on the CPU, without a copy where it is that already."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    return factor.detach().to(device="cpu", dtype=wide).numpy()


def _gram(tall: np.ndarray) -> np.ndarray:
    """``tall^T tall`` in float64, ``(r, r)``, from blocks of rows.

    Blocks stay in the cache, never need a float64 copy of the factor, and are too small for a BLAS to spread over
    threads, which would cost more than it saves and much more on a busy machine.
    """
    total = np.zeros((tall.shape[1], tall.shape[1]))
    for start in range(0, tall.shape[0], _BLOCK):
        block = tall[start : start + _BLOCK].astype(np.float64)
        total += block.T @ block
    return total


def _by_gram(A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and the mixing m of the direction A^T m, from ``A A^T`` and ``B^T B``; None where those lose digits.

    With ``B^T B = X X^T``, ``(B A)^T (B A) = (X^T A)^T (X^T A)``: the squared values are the eigenvalues of
    ``X^T A A^T X``, and ``A^T X w / sigma_1`` the right singular vector, w the leading eigenvector.
    """
    if A.shape[0] > max(A.shape[1], B.shape[0]):
        # The Gram matrices would be larger than the factors, without bound: a rank of 100,000 fits into a small file.
        return None
    kept = min(A.shape[0], A.shape[1], B.shape[0])
    gram_A, gram_B = _gram(A.T), _gram(B)
    shares, turned = np.linalg.eigh(gram_B)
    X = turned * np.sqrt(np.maximum(shares, 0.0))  # [r, r]
    squares, W = np.linalg.eigh(X.T @ gram_A @ X)  # ascending
    smallest = _GRAM_SHARE**2 * np.trace(gram_A) * np.trace(gram_B)
    if not squares[-kept] > smallest > 0.0:
        return None
    values = np.sqrt(squares[-kept:][::-1])
    return values, X @ (W[:, -1] / values[0])


def _by_qr(A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and the mixing m of the direction A^T m, from triangular factors of A^T and B; None for a zero B A."""
    R_A, R_B = (
        torch.linalg.qr(torch.from_numpy(tall).to(torch.float64), mode="r").R.numpy() for tall in (A.T, B)
    )  # [k_A, r], [k_B, r]
    X, values, _ = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    if values[0] <= _ZERO_SHARE * np.linalg.norm(R_A) * np.linalg.norm(R_B):
        return values, None
    return values, R_B.T @ (X[:, 0] / values[0])  # (B A)^T u_1 / sigma_1 = A^T m
