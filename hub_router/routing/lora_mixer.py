"""``lora-mixer``: a linear router per module, dense while it is trained, its top-k unnormalised at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import integer, set_name, validate
from hub_router.routing.project import project
from hub_router.routing.top_k import best
from hub_router.routing.trained import PROTOTYPES, trained_vectors


@dataclass(frozen=True)
class LoraMixer:
    """`LoRA-Mixer <https://arxiv.org/abs/2507.00029>`_: ``p = softmax(V x)`` over the candidates of a module (Eq. 1-4).

    At inference each token takes the ``top_k`` adapters of largest p, weighted by p as it is (Eq. 2 does not
    renormalise it). Before training V is zero, and p is 1/C.

    Args:
        top_k (int): experts per token and module.
        prototypes (str): prototype set with the rows of V.
    """

    name: ClassVar[str] = "lora-mixer"
    title: ClassVar[str] = "top-k per token of a softmax over a trained linear router, not renormalised"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.00029"
    projects: ClassVar[bool] = False

    top_k: int = integer(3, at_least=1, help="experts per token and module")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; V ``(C, D_in)``, zeros before training."""
        start = torch.zeros(len(bank.ranks), bank.d_in)
        return Prepared(bank, {PROTOTYPES: trained_vectors(bank, adapters, known, self.prototypes, self.name, start)})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`."""
        shares = self.shares(tensors[PROTOTYPES], x)
        return Gates(*best(shares, self.top_k))  # [..., K]

    def shares(self, vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The share p of every candidate.

        Args:
            vectors (torch.Tensor): V ``(C, D_in)``.
            x (torch.Tensor): inputs ``(..., D_in)`` or token ids ``(...)``.

        Returns:
            torch.Tensor: ``(..., C)``.
        """
        return torch.softmax(project(x, vectors), dim=-1)
