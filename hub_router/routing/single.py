"""``single``: one chosen adapter, the oracle of the papers when it is the task's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

import torch

from hub_router.errors import MethodError
from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import select
from hub_router.routing.hyperparameters import text, validate


@dataclass(frozen=True)
class Single:
    """``w = 1`` on one adapter: plain `LoRA <https://arxiv.org/abs/2106.09685>`_, ``y = W x + s B A x`` (Eq. 3).

    Args:
        adapter (str): its name in the pool.
    """

    name: ClassVar[str] = "single"
    title: ClassVar[str] = "one adapter for everything"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    projects: ClassVar[bool] = False

    adapter: str = text(help="name of the adapter in the pool")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; the adapter must be in the pool."""
        if self.adapter not in pool.adapters:
            close = get_close_matches(self.adapter, pool.adapters, n=1)
            raise MethodError(
                f"method 'single' cannot use adapter={self.adapter!r}, expected a name of the pool: "
                + ", ".join(repr(name) for name in pool.adapters)
                + (f"; did you mean {close[0]!r}?" if close else "")
            )

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; the one."""
        return (self.adapter,)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the others' factors are left out."""
        position = list(adapters).index(self.adapter)
        chosen = select(bank, [number for number, expert in enumerate(bank.experts) if expert == position])
        return Prepared(chosen, {})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the only candidate gets all."""
        return Gates(x.new_ones(1, dtype=torch.promote_types(x.dtype, torch.float32)))  # [1]
