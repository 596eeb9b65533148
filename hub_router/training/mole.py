"""Training of ``mole``: its gates over frozen adapters, with a balance loss on every module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from hub_router.routing.base import Gates, Router
from hub_router.routing.mole import Mole
from hub_router.routing.top_k import top_k
from hub_router.training.balance import Auxiliary, BalanceLoss, Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class MoleRecipe:
    """`MoLE <https://arxiv.org/abs/2404.13628>`_: task loss plus balance loss, all candidates' weights dense.

    Args:
        loss (BalanceLoss | None): of every module, averaged over them; a token's slot is its candidate of largest
            weight. None trains by the task's loss alone.
    """

    name: ClassVar[str] = "mole"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=1e-3)

    loss: BalanceLoss | None = field(default_factory=Auxiliary)

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; all gates at once."""
        return (Phase("mole", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; the method's own."""
        assert state.h is not None
        shares = cast(Mole, router).shares(state.vectors, state.tensors, state.h)  # [..., C]
        return Decision(Gates(shares), shares, top_k(shares, 1))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`; mean over modules."""
        if self.loss is None or not spreads:
            return None
        return torch.stack([self.loss(spread, 1.0) for spread in spreads]).mean()
