"""``spectr``: per token and module, the adapters that stretch the input most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.lora.spectrum import svd
from hub_router.routing.base import Gates, Merge, Prepared
from hub_router.routing.candidates import need_averageable_factors
from hub_router.routing.hyperparameters import choice, integer, validate
from hub_router.routing.top_k import best

# Under the square root, so that its slope stays finite where a token projects to nothing.
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spectr:
    """`SpectR <https://arxiv.org/abs/2504.03454>`_: spectral alignment (Eq. 6) and routing by length (Eq. 7-9).

    With the SVD ``B_e A_e = U S V^T`` the factors become ``A*_e = S V^T`` and ``B*_e = U``; ``h_e = A*_e x`` and
    ``score_e = ||h_e||_2``. The ``top_k`` best are summed by Eq. 13 (``merge="outputs"``) or by Eq. 10-12
    (``merge="factors"``, which needs candidates of equal rank).

    In half precision ``h`` is the product that B multiplies, rounded once; its length is summed in float32. A second,
    float32 projection for the score alone would cost several times the adapters' own work.

    Args:
        top_k (int): experts per token and module.
        weights (str): ``uniform``: 1/k each; ``softmax``: of the selected scores (end of Sec. 3.3).
        merge (str): ``outputs`` or ``factors``.
    """

    name: ClassVar[str] = "spectr"
    title: ClassVar[str] = "top-k per token by ||S V^T x||, equal or softmax weights"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.03454"
    projects: ClassVar[bool] = True

    top_k: int = integer(4, at_least=1, help="experts per token and module")
    weights: str = choice("uniform", among=("uniform", "softmax"), help="how the selected share a token")
    merge: str = choice("outputs", among=("outputs", "factors"), help="average outputs (Eq. 13) or factors (Eq. 10-12)")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; ``merge="factors"`` needs factors that can be averaged."""
        if self.merge == "factors":
            need_averageable_factors(pool, "method 'spectr' with merge='factors'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; Eq. 2 and 6, and each component's candidate."""
        aligned_A, aligned_B, ranks = [], [], []
        for part in bank.slices:
            U, S, V = svd(bank.A[part], bank.B[:, part])
            aligned_A.append(S.unsqueeze(-1) * V.mT)  # [r, D_in]
            aligned_B.append(U)  # [D_out, r]
            ranks.append(S.shape[0])
        aligned = replace(bank, A=torch.cat(aligned_A), B=torch.cat(aligned_B, dim=1), ranks=tuple(ranks))
        tensors = {"owners": aligned.component_experts, "zeros": torch.zeros(len(ranks))}
        return Prepared(aligned, tensors, cast(Merge, self.merge), own_factors=True)

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; Eq. 7-9 and the weights of Eq. 10, 11 and 13."""
        assert h is not None
        squares = h.to(torch.promote_types(h.dtype, torch.float32)).square()  # [..., R]
        none = tensors["zeros"].to(squares.dtype).expand(*squares.shape[:-1], -1)
        scores = none.index_add(-1, tensors["owners"], squares).clamp_min(_SMALLEST).sqrt()  # [..., C]
        selected, chosen = best(scores, self.top_k)  # [..., K]
        if self.weights == "softmax":
            return Gates(torch.softmax(selected, dim=-1), chosen)
        return Gates(torch.full_like(selected, 1.0 / chosen.shape[-1]), chosen)
