"""``uniform``: the mean of all candidates' outputs, with no regard to the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared


@dataclass(frozen=True)
class Uniform:
    """``w_e = 1/C`` over the C candidates of the module, the mu-routing of `SpectR <https://arxiv.org/abs/2504.03454>`_.

    ``y = W x + sum_e w_e B_e A_e x``; adapters that do not adapt the module do not dilute those that do.
    """

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "mean of all adapters' outputs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.03454"
    projects: ClassVar[bool] = False

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; everybody scores the same."""
        return Prepared(bank, {"scores": torch.zeros(len(bank.ranks))})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the softmax of equal scores is 1/C each."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return Gates(torch.softmax(tensors["scores"].to(wide), dim=-1))  # [C]
