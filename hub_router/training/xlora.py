"""Training of ``xlora``: its classifier by the task's loss; adapters and base model are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from hub_router.routing.base import Router
from hub_router.routing.xlora import Xlora
from hub_router.training.balance import Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class XloraRecipe:
    """`X-LoRA <https://arxiv.org/abs/2402.07148>`_: the gates of inference, trained by the task's loss alone."""

    name: ClassVar[str] = "xlora"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=1e-3)

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; the classifier as a whole."""
        return (Phase("xlora", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; the method's own."""
        xlora = cast(Xlora, router)
        return Decision(xlora.gates(xlora.shares(state.vectors, x)))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`; none."""
        return None
