"""Singular values and singular vectors of ``B A`` from its factors; ``B A`` itself is never formed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.records import Spectrum

AMBIGUOUS = 1e-4

# Gram matrices square the condition: a value below this share of |A|_F |B|_F would lose digits that float32 holds.
_GRAM_SHARE = 3e-5
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
    which give each value of at least 3e-5 |A|_F |B|_F to float32's precision or better; where one is smaller,
    Householder QR of the factors takes over (:func:`svd`'s route), so accuracy never depends on the condition.

    Args:
        module (str): module path in the base model.
        factors (LoraFactors): factors and scaling, finite.

    Returns:
        Spectrum: r values, padded with zeros where r exceeds a width. The vector's largest component is positive; it
        is None where B A is zero, and ``ambiguous`` where the two largest values agree to 1e-4 of the larger.
    """
    with torch.no_grad():
        A, B = factors.A.to(torch.float64), factors.B.to(torch.float64)
        values, direction = _by_gram(A, B) or _by_qr(A, B)  # [k], [D_in]
    scaled = values.cpu().numpy() * abs(factors.scaling)
    padded = np.zeros(factors.rank, dtype=np.float32)  # [r]
    if direction is None or factors.scaling == 0.0:
        return Spectrum(module, padded, None, ambiguous=False)
    padded[: len(scaled)] = scaled
    vector = direction.cpu().numpy()
    vector = vector / (np.linalg.norm(vector) * np.sign(vector[np.abs(vector).argmax()]))
    ambiguous = len(scaled) > 1 and scaled[0] - scaled[1] <= AMBIGUOUS * scaled[0]
    return Spectrum(module, padded, vector.astype(np.float32), bool(ambiguous))


def spectra(adapter: LoraAdapter) -> Iterator[Spectrum]:
    """The spectrum of every module, one at a time, so that memory stays at one module's float64 copy.

    Args:
        adapter (LoraAdapter): an adapter as read.

    Yields:
        Spectrum: in the order of ``adapter.modules``.
    """
    for module, factors in adapter.modules.items():
        yield spectrum(module, factors)


def _by_gram(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values and unnormalised direction from ``A A^T`` and ``B^T B``, or None where those lose digits.

    With ``B^T B = X X^T``, ``(B A)^T (B A) = (X^T A)^T (X^T A)``: the squared values are the eigenvalues of
    ``X^T A A^T X``, and ``A^T X w`` is the right singular vector of its leading eigenvector w.
    """
    kept = min(A.shape[0], A.shape[1], B.shape[0])
    gram_A, gram_B = A @ A.T, B.T @ B  # [r, r]
    shares, turned = torch.linalg.eigh(gram_B)
    X = turned * shares.clamp_min(0.0).sqrt()  # [r, r]
    squares, W = torch.linalg.eigh(X.T @ gram_A @ X)  # ascending
    bound = _GRAM_SHARE**2 * gram_A.trace() * gram_B.trace()
    if not bool((squares[-kept] > bound) & (bound > 0)):
        return None
    return squares[-kept:].flip(0).sqrt(), A.T @ (X @ W[:, -1])


def _by_qr(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and unnormalised direction from the triangular factors of A^T and B; no direction where B A is zero."""
    R_A = torch.linalg.qr(A.T, mode="r").R  # [k_A, r]
    R_B = torch.linalg.qr(B, mode="r").R  # [k_B, r]
    X, values, _ = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    if bool(values[0] <= _ZERO_SHARE * R_A.norm() * R_B.norm()):
        return values, None
    return values, A.T @ (R_B.T @ X[:, 0])  # (B A)^T u_1
