"""``merged``: one adapter made of the mean factors of all candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_averageable_factors
from hub_router.routing.one_update import one_update, whole


@dataclass(frozen=True)
class Merged:
    """``w_e = 1/C`` on both factors, the "Merged" baseline of `HiLoRA <https://arxiv.org/abs/2510.12266>`_.

    ``y = W x + (sum_e w_e B_e) (sum_f w_f A_f) x``, which needs candidates of equal rank.
    """

    name: ClassVar[str] = "merged"
    title: ClassVar[str] = "one adapter of all adapters' mean factors"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.12266"
    projects: ClassVar[bool] = False

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; ranks must be equal, updates no more than B A."""
        need_averageable_factors(pool, "method 'merged'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the mean factors."""
        count = len(bank.ranks)
        A = bank.A.unflatten(0, (count, -1)).mean(0)  # [r, D_in]
        B = bank.B.unflatten(1, (count, -1)).mean(1)  # [D_out, r]
        return one_update(bank, A, B, torch.full((count,), 1 / count), adapters)

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the one adapter gets all."""
        return whole(x)
