"""``knots``: one adapter merged in the basis that a single SVD gives all adapters of the pool in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_plain_factors
from hub_router.routing.hyperparameters import choice, fraction, positive, validate
from hub_router.routing.one_update import one_update, whole

# Below this share of the largest singular value, a direction is the rounding of float32 factors.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Knots:
    """`KnOTS <https://arxiv.org/abs/2410.19735>`_: the updates side by side, ``[dW_1 .. dW_C] = U S [V_1^T .. V_C^T]``.

    All candidates then speak of the same directions U, and their ``V_e^T`` are merged to one ``V^T`` ``(R', D_in)``:
    ``y = W x + U S V^T x``, ``A' = V^T``, ``B' = U S``. ``merge="ties"`` is `TIES <https://arxiv.org/abs/2306.01708>`_
    by PEFT's ``ties``: of each ``V_e^T`` the share ``density`` of largest magnitude is kept, each entry's sign is that
    of the sum, and those that agree are averaged. ``merge="linear"`` averages all, which is the mean of the updates.
    ``scale`` multiplies the result. A candidate that is alone is not trimmed. ``density`` 0.2 and ``scale`` 1 are what
    TIES recommends where nothing can be tuned; the KnOTS authors tune both for every experiment.

    The authors' code differs from the paper's formula in trimming ``S V_e^T``, across all modules at once; here each
    module is merged by itself, by the formula. For TIES the C matrices ``(R', D_in)`` of a module are in memory a few
    times over, R' up to min(R, D_out).

    Args:
        merge (str): ``ties`` or ``linear``.
        density (float): share of entries that TIES keeps of each adapter.
        scale (float): factor of the merged update, lambda of TIES.
    """

    name: ClassVar[str] = "knots"
    title: ClassVar[str] = "one adapter merged by TIES in the pool's common singular basis"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.19735"
    projects: ClassVar[bool] = False

    merge: str = choice("ties", among=("ties", "linear"), help="how the adapters' right factors become one")
    density: float = fraction(0.2, help="share of entries that ties keeps of each adapter")
    scale: float = positive(1.0, help="factor of the merged update")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; updates must be no more than B A."""
        need_plain_factors(pool, "method 'knots'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    @torch.no_grad()
    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the merged factors, and equal shares before any trimming."""
        US, rights = side_by_side(bank)
        count = len(rights)
        linear = self.merge == "linear" or count == 1
        merged = torch.stack(rights).mean(0) if linear else self._ties(rights)  # [R', D_in]
        return one_update(bank, self.scale * merged, US, torch.full((count,), self.scale / count), adapters)

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the one adapter gets all."""
        return whole(x)

    def _ties(self, rights: Sequence[torch.Tensor]) -> torch.Tensor:
        from peft.utils.merge_utils import ties

        # PEFT warns where a density of 1 trims nothing.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ties(list(rights), rights[0].new_ones(len(rights)), self.density)


def side_by_side(bank: ModuleBank) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """SVD of the candidates' updates side by side; no update is ever formed.

    With ``B = Q_B R_B`` of the stacked B and ``A_e^T = Q_e R_e`` of each A, ``[.. B_e A_e ..] = Q_B [.. R_B,e R_e^T ..]
    blockdiag(.. Q_e^T ..)``: an SVD of k_B x R suffices. Computed in float64.

    Args:
        bank (ModuleBank): C candidates.

    Returns:
        tuple[torch.Tensor, tuple[torch.Tensor, ...]]: ``U S`` ``(D_out, R')`` and each candidate's ``V_e^T``
        ``(R', D_in)``, in float32 or wider, without directions of no size. The largest component of each column of U
        is positive, which fixes the signs.
    """
    dtype = torch.promote_types(bank.A.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(bank.B.to(torch.float64))  # [D_out, k_B], [k_B, R]
    bases, cores = [], []
    for part in bank.slices:
        Q, R = torch.linalg.qr(bank.A[part].to(torch.float64).mT)  # [D_in, k_e], [k_e, r_e]
        bases.append(Q)
        cores.append(R_B[:, part] @ R.mT)  # [k_B, k_e]
    X, S, Yt = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    kept = _ROUNDING * S[0] < S
    U, S, Yt = Q_B @ X[:, kept], S[kept], Yt[kept]  # [D_out, R'], [R'], [R', sum of k_e]
    peaks = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # [1, R']
    signs = torch.where(peaks < 0, -1.0, 1.0)
    parts = (signs.mT * Yt).split([Q.shape[1] for Q in bases], dim=1)
    return (signs * U * S).to(dtype), tuple((part @ Q.mT).to(dtype) for part, Q in zip(parts, bases, strict=True))
