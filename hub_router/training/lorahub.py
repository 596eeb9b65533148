"""Training of ``lorahub``: a weight per adapter, searched for on a few examples without gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch

from hub_router.errors import TrainingError
from hub_router.routing.base import Gates, Router
from hub_router.training.balance import Spread
from hub_router.training.gating import Decision, ModuleState
from hub_router.training.recipe import Phase, Searcher
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class LorahubRecipe:
    """`LoRAHub <https://arxiv.org/abs/2307.13269>`_, Sec. 3.4: task loss plus ``l1 mean |w|``, minimised by NGOpt.

    The examples may be of any task: which adapter they name does not matter to the search.

    Args:
        shots (int): examples of each adapter's task that the loss is taken on; the same ones every time.
        bound (float): largest ``|w_e|``.
        l1 (float): coefficient of the mean absolute weight.
    """

    name: ClassVar[str] = "lorahub"
    settings: ClassVar[TrainingSettings] = TrainingSettings(steps=40)

    shots: int = 5
    bound: float = 1.5
    l1: float = 0.05

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.shots, int) or isinstance(self.shots, bool) or self.shots < 1:
            faults.append(f"shots={self.shots!r}, expected an integer of at least 1")
        if not _is_number(self.bound) or not 0 < self.bound < math.inf:
            faults.append(f"bound={self.bound!r}, expected a finite number above 0")
        if not _is_number(self.l1) or not 0 <= self.l1 < math.inf:
            faults.append(f"l1={self.l1!r}, expected a finite number of at least 0")
        if faults:
            raise TrainingError(f"recipe 'lorahub' cannot use {'; '.join(faults)}")
        if find_spec("nevergrad") is None:
            raise TrainingError(
                "recipe 'lorahub' searches with nevergrad, which is not installed: pip install 'hub-router[lorahub]'"
            )

    def phases(self, adapters: Sequence[str], tasks: Sequence[int]) -> Sequence[Phase]:
        """See :class:`~hub_router.training.recipe.Recipe`; all in one."""
        return (Phase("lorahub", tuple(range(len(adapters))), tuple(tasks)),)

    def gate(self, router: Router, state: ModuleState, x: torch.Tensor) -> Decision:
        """See :class:`~hub_router.training.recipe.Recipe`; w, whatever the input."""
        return Decision(Gates(state.vectors.squeeze(-1)))

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`; none."""
        return None

    def optimizer(self, adapters: int, evaluations: int, seed: int) -> Searcher:
        """See :class:`~hub_router.training.recipe.SearchRecipe`; nevergrad's NGOpt, which starts at 0."""
        return _NGOpt(adapters, evaluations, seed, self.bound)

    def penalty(self, weights: Sequence[float]) -> float:
        """See :class:`~hub_router.training.recipe.SearchRecipe`; ``l1 mean |w|``."""
        return self.l1 * sum(map(abs, weights)) / len(weights)


class _NGOpt:
    """nevergrad's choice of an optimizer for so many numbers and evaluations."""

    def __init__(self, adapters: int, evaluations: int, seed: int, bound: float) -> None:
        import nevergrad

        weights = nevergrad.p.Array(init=np.zeros(adapters), lower=-bound, upper=bound)
        weights.random_state = np.random.RandomState(seed)
        self._optimizer: Any = nevergrad.optimizers.NGOpt(parametrization=weights, budget=evaluations)
        self._size = f"{adapters} adapters and {evaluations} evaluations"
        self._asked: Any = None

    def ask(self) -> list[float]:
        """See :class:`~hub_router.training.recipe.Searcher`."""
        fault = ""
        with warnings.catch_warnings():
            # Of the optimizers beneath, about tolerances that nobody here has set.
            warnings.simplefilter("ignore")
            try:
                self._asked = self._optimizer.ask()
            except Exception as error:  # noqa: BLE001 - whatever one of its many optimizers raises
                fault = f"{type(error).__name__}: {error}"
        # Outside, for the error's frames would hold the optimizer, and its thread would keep the process alive.
        if fault:
            raise TrainingError(
                f"recipe 'lorahub': nevergrad cannot go on with {self._size} ({fault}); set other steps, such as 40"
            )
        return [float(each) for each in self._asked.value]

    def tell(self, loss: float) -> None:
        """See :class:`~hub_router.training.recipe.Searcher`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optimizer.tell(self._asked, loss)

    def close(self) -> None:
        """See :class:`~hub_router.training.recipe.Searcher`; its thread ends when nothing holds the optimizer."""
        self._optimizer = self._asked = None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
