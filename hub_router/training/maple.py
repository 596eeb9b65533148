"""Training of ``maple``: the parent's rule, without the adapter of the input's own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from hub_router.errors import TrainingError
from hub_router.routing.base import Gates, Router
from hub_router.routing.maple import Maple
from hub_router.routing.top_k import best
from hub_router.training.balance import Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase
from hub_router.training.settings import TrainingSettings

MASKS = ("after", "before", "none")


@dataclass(frozen=True)
class MapleRecipe:
    """`MAPLE <https://openreview.net/forum?id=YxVebk7kIw>`_, Algorithm 1 and Fig. 2: all prototypes, jointly.

    Args:
        mask (str): ``after``: the input's own adapter is masked where it is among the top k (Fig. 2), so that k - 1
            share the token; ``before``: it is no candidate, and k others are chosen; ``none``: the ablation. True and
            False stand for the first and the last.
    """

    name: ClassVar[str] = "maple"
    settings: ClassVar[TrainingSettings] = TrainingSettings(learning_rate=1e-3, batch_size=16, epochs=1.0, warmup=0.06)

    mask: str = "after"

    def __post_init__(self) -> None:
        if isinstance(self.mask, bool):
            object.__setattr__(self, "mask", "after" if self.mask else "none")
        if self.mask not in MASKS:
            raise TrainingError(f"recipe 'maple' cannot use mask={self.mask!r}, expected {' or '.join(MASKS)}")

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; all in one."""
        if self.mask != "none" and len(adapters) < 2:
            raise TrainingError("maple masks the adapter of an input's task, and this pool has no other; add some")
        return (Phase("maple", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`."""
        maple = cast(Maple, router)
        scores = maple.scores(state.vectors, x)  # [..., C]
        # Finite, so that a token whose whole choice is masked has gradients; its weights are zeroed below.
        nothing = torch.finfo(scores.dtype).min
        if self.mask == "before":
            scores = scores.masked_fill(state.experts == state.own, nothing)
        selected, chosen = best(scores, maple.count)  # [..., K]
        masked = torch.zeros_like(selected, dtype=torch.bool)
        if self.mask != "none":
            masked = state.experts[chosen] == state.own
            selected = selected.masked_fill(masked, nothing)
        return Decision(Gates(torch.softmax(selected, dim=-1) * ~masked, chosen))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Recipe`; none."""
        return None
