"""What a method brings to the training loop. Adding one takes its file, one line in the registry, and its test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from hub_router.routing.base import Router
from hub_router.training.balance import Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class Phase:
    """A part of a run: some adapters' vectors, trained on some adapters' examples by an optimizer of their own.

    Args:
        title (str): for progress and log.
        vectors (tuple[int, ...]): pool positions of the adapters whose vectors are trained.
        tasks (tuple[int, ...]): pool positions of the adapters whose examples are read.
    """

    title: str
    vectors: tuple[int, ...]
    tasks: tuple[int, ...]


class Recipe(Protocol):
    """How a method's vectors are trained: a frozen dataclass whose fields are its options.

    Attributes:
        name (str): the method's registry name.
        settings (TrainingSettings): the paper's.
    """

    name: ClassVar[str]
    settings: ClassVar[TrainingSettings]

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """The parts of a run, one after another.

        Args:
            adapters (Sequence[str]): names of the pool.
            tasks (Sequence[int]): pool positions of the adapters that have examples.

        Returns:
            Sequence[Phase]: at least one.
        """
        ...

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """The rule that gates tokens while training; see :class:`~hub_router.training.gating.Gate`."""
        ...

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """The loss beside the task's.

        Args:
            spreads (Sequence[Spread]): of all modules.
            done (float): share of the phase's steps that are done.

        Returns:
            torch.Tensor | None: scalar; None where there is none.
        """
        ...
