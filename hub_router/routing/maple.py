"""``maple``: a parent method's rule with prototypes that were refined together, each task without its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.arrow import Arrow
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import choice, optional_integer, set_name, validate
from hub_router.routing.phatgoose import Phatgoose, phatgoose_scores
from hub_router.routing.project import project
from hub_router.routing.top_k import best
from hub_router.routing.trained import PROTOTYPES, in_place, trained_vectors

_PARENTS: Mapping[str, type[Arrow] | type[Phatgoose]] = {"arrow": Arrow, "phatgoose": Phatgoose}


@dataclass(frozen=True)
class Maple:
    """`MAPLE <https://openreview.net/forum?id=YxVebk7kIw>`_: the prototypes of a parent, trained jointly (Algorithm 1).

    While training, the adapter that was trained on the input's task is masked where it is among the ``top_k`` (Fig. 2);
    at inference nothing is. Scores are the parent's, ``|p . x|`` for Arrow, so that before any training the gates are
    the parent's, too.

    Args:
        parent (str): ``arrow`` or ``phatgoose``, whose rule it follows.
        top_k (int | None): experts per token and module; None takes the parent's default.
        prototypes (str): prototype set, of MAPLE or of the parent; without one the gates are the parent's own.
    """

    name: ClassVar[str] = "maple"
    title: ClassVar[str] = "arrow or phatgoose with prototypes refined jointly, each task's own adapter masked"
    paper: ClassVar[str] = "https://openreview.net/forum?id=YxVebk7kIw"
    projects: ClassVar[bool] = False

    parent: str = choice("arrow", among=tuple(_PARENTS), help="whose rule scores and weighs")
    top_k: int | None = optional_integer(at_least=1, help="experts per token and module; by default the parent's")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the set's vectors ``(C, D_in)``, else the parent's own."""
        own = known.prototypes.get(self.prototypes or in_place(self.kind))
        if own is None and not self.prototypes:
            return _PARENTS[self.parent]().prepare(bank, adapters, known)
        start = torch.zeros(len(bank.ranks), bank.d_in)
        if own is not None and any(adapters[expert] not in own for expert in bank.experts):
            # Adapters without a direction were no candidates of the parent when the set was trained, and are none now.
            prepared = _PARENTS[self.parent]().prepare(bank, adapters, known)
            bank, start = prepared.bank, prepared.tensors[PROTOTYPES]
        vectors = trained_vectors(bank, adapters, known, self.prototypes, self.name, start, kind=self.kind)
        return Prepared(bank, {PROTOTYPES: vectors})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the parent's."""
        selected, chosen = best(self.scores(tensors[PROTOTYPES], x), self.count)  # [..., K]
        return Gates(torch.softmax(selected, dim=-1), chosen)

    def scores(self, vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Every candidate's score by the parent's rule.

        Args:
            vectors (torch.Tensor): prototypes ``(C, D_in)``.
            x (torch.Tensor): inputs ``(..., D_in)`` or token ids ``(...)``.

        Returns:
            torch.Tensor: ``(..., C)``.
        """
        return phatgoose_scores(vectors, x) if self.parent == "phatgoose" else project(x, vectors).abs()

    @property
    def count(self) -> int:
        """Experts per token and module."""
        return _PARENTS[self.parent].top_k if self.top_k is None else self.top_k

    @property
    def kind(self) -> str:
        """What its vectors are: prototypes by the parent's rule."""
        return f"{self.name} {self.parent}"
