"""What a method brings to the training loop. Adding one takes its file, one line in the registry, and its test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

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


class Objective(Protocol):
    """What the loop of gradient steps asks.

    Attributes:
        name (str): the method's registry name.
    """

    name: ClassVar[str]

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """The loss beside the task's.

        Args:
            spreads (Sequence[Spread]): of all modules.
            done (float): share of the phase's steps that are done.

        Returns:
            torch.Tensor | None: scalar; None where there is none.
        """
        ...


class Recipe(Objective, Protocol):
    """How a method's vectors are trained: a frozen dataclass whose fields are its options.

    Attributes:
        settings (TrainingSettings): the paper's.
    """

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


@runtime_checkable
class SearchRecipe(Recipe, Protocol):
    """A recipe whose vectors are one number per adapter, the same in all modules, found without gradients.

    A step of its settings is an evaluation of the loss; rate, schedule and the like mean nothing to it.
    """

    shots: int

    def optimizer(self, adapters: int, evaluations: int, seed: int) -> Searcher:
        """A fresh optimizer, which proposes alike for equal arguments and losses.

        Args:
            adapters (int): E, how many numbers there are.
            evaluations (int): how many proposals it will make.
            seed (int): of its draws.

        Returns:
            Searcher: at its start.

        Raises:
            TrainingError: a package that it needs is not installed; says how to install it.
        """
        ...

    def penalty(self, weights: Sequence[float]) -> float:
        """What is added to the task's loss.

        Args:
            weights (Sequence[float]): a number per adapter.

        Returns:
            float: nats.
        """
        ...


class Searcher(Protocol):
    """A gradient-free optimizer: asked for a proposal, then told its loss."""

    def ask(self) -> list[float]:
        """The next proposal, a number per adapter.

        Raises:
            TrainingError: there is none.
        """
        ...

    def tell(self, loss: float) -> None:
        """The loss of the proposal at hand."""
        ...

    def close(self) -> None:
        """End what runs behind it; nothing may be asked any more."""
        ...
