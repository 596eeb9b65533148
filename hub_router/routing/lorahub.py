"""``lorahub``: one adapter made of all adapters' factors, with a weight per adapter that was searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_averageable_factors
from hub_router.routing.hyperparameters import set_name, validate
from hub_router.routing.trained import PROTOTYPES, trained_vectors


@dataclass(frozen=True)
class Lorahub:
    """`LoRAHub <https://arxiv.org/abs/2307.13269>`_: ``y = W x + (sum_e w_e B_e) (sum_f w_f A_f) x``, Eq. 1.

    The weights w_e are the same in all modules and for all inputs, and of any sign; they are not normalised. Before
    training they are 0, which is the base model. Needs candidates of equal rank. A prototype set holds w_e as a vector
    of length 1 in every module of adapter e.

    Args:
        prototypes (str): prototype set with the weights.
    """

    name: ClassVar[str] = "lorahub"
    title: ClassVar[str] = "one adapter of all adapters' weighted factors, the weights searched for on a few examples"
    paper: ClassVar[str] = "https://arxiv.org/abs/2307.13269"
    projects: ClassVar[bool] = False

    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; ranks must be equal, updates no more than B A."""
        need_averageable_factors(pool, "method 'lorahub'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; w ``(C, 1)``, zeros before training."""
        start = torch.zeros(len(bank.ranks), 1)
        weights = trained_vectors(bank, adapters, known, self.prototypes, self.name, start)
        return Prepared(bank, {PROTOTYPES: weights}, merge="factors")

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; w ``(C,)``, whatever the input."""
        return Gates(tensors[PROTOTYPES].squeeze(-1))
