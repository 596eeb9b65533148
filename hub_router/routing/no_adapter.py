"""``base``: no adapter at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import select


@dataclass(frozen=True)
class Base:
    """The base model alone, the lower bound of every comparison."""

    name: ClassVar[str] = "base"
    title: ClassVar[str] = "no adapter: the base model as it is"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; nobody gets a weight."""
        return ()

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; nobody is a candidate."""
        return Prepared(select(bank, ()), {})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; nothing to weigh."""
        return Gates(x.new_zeros(0, dtype=torch.float32))
