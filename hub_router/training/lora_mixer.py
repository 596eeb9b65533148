"""Training of ``lora-mixer``, stage 2: a dense softmax over frozen adapters, balanced by RSL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from hub_router.routing.base import Gates, Router
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.routing.top_k import top_k
from hub_router.training.balance import BalanceLoss, Specialisation, Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings

# Share of the steps over which the coefficients of the balance loss rise (A.8 has them rise in the early stage).
_RAMP = 0.3


@dataclass(frozen=True)
class LoraMixerRecipe:
    """`LoRA-Mixer <https://arxiv.org/abs/2507.00029>`_, Eq. 12 with frozen adapters: task loss plus balance loss.

    Args:
        loss (BalanceLoss | None): of every module, averaged over them; None trains by the task's loss alone.
    """

    name: ClassVar[str] = "lora-mixer"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=1e-3)

    loss: BalanceLoss | None = field(default_factory=Specialisation)

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; the router as a whole."""
        return (Phase("lora-mixer", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; p of all candidates, and the top k that count as slots."""
        mixer = cast(LoraMixer, router)
        shares = mixer.shares(state.vectors, x)  # [..., C]
        return Decision(Gates(shares), shares, top_k(shares, mixer.top_k))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Recipe`; mean over modules, its coefficients rising."""
        if self.loss is None or not spreads:
            return None
        ramp = min(1.0, done / _RAMP)
        return torch.stack([self.loss(spread, ramp) for spread in spreads]).mean()
