"""Training of ``phatgoose``: each adapter's gate vector alone, on the data of its own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.routing.base import Gates, Router
from hub_router.routing.project import project
from hub_router.training.balance import Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class PhatgooseRecipe:
    """`PHATGOOSE <https://arxiv.org/abs/2402.05859>`_, Sec. 3.1: ``y = W x + sigmoid(v . x) B A x``, v trained."""

    name: ClassVar[str] = "phatgoose"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=1e-3, steps=100)

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; one for every adapter, whose optimizer sees no other."""
        return tuple(Phase(adapters[number], (number,), (number,)) for number in tasks)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; the base alone in a module that the adapter leaves alone."""
        if not state.rows.numel():
            leading = state.own.shape
            return Decision(Gates(x.new_zeros(leading, dtype=torch.float32), torch.zeros_like(state.own)))
        weights = torch.sigmoid(project(x, state.vectors))  # [..., 1]
        return Decision(Gates(weights, state.rows.expand(weights.shape)))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Recipe`; none."""
        return None
