"""Training of ``mixlora``: the routers of the feed-forward blocks, with a load balance loss on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from hub_router.routing.base import Router
from hub_router.routing.mixlora import Mixlora
from hub_router.training.balance import Auxiliary, BalanceLoss, Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class MixloraRecipe:
    """`MixLoRA <https://arxiv.org/abs/2404.15159>`_: task loss plus balance loss.

    The paper trains the experts as well, from nothing: :func:`hub_router.training.experts.fit_experts`. Here they are
    adapters that stay as they are.

    Args:
        loss (BalanceLoss | None): of every block times its number of experts (Eq. 5), averaged over blocks; None trains
            by the task's loss alone.
    """

    name: ClassVar[str] = "mixlora"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=2e-4, batch_size=16, epochs=2.0)

    loss: BalanceLoss | None = field(default_factory=lambda: Auxiliary(alpha=0.01))

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; all routers at once."""
        return (Phase("mixlora", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; the method's own, whose choice counts as the slots."""
        mixlora = cast(Mixlora, router)
        shares = mixlora.shares(state.vectors, x)  # [..., C]
        gates = mixlora.gates(shares)
        return Decision(gates, shares, gates.indices)

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`; mean over blocks."""
        if self.loss is None or not spreads:
            return None
        return torch.stack([len(spread.slots) * self.loss(spread, 1.0) for spread in spreads]).mean()
