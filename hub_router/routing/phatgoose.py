"""``phatgoose``: per token, the adapters whose trained gate vector the input is most like, both standardised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import integer, set_name, validate
from hub_router.routing.project import project
from hub_router.routing.top_k import best
from hub_router.routing.trained import PROTOTYPES, standardise, trained_vectors


@dataclass(frozen=True)
class Phatgoose:
    """`PHATGOOSE <https://arxiv.org/abs/2402.05859>`_: gates that each adapter learned on its own task's data.

    Sec. 3: the vector v_e was trained alone, as the gate ``sigmoid(v_e . x)`` of its adapter. Between adapters,
    ``score_e = x' . v_e' / sqrt(D_in)`` of the standardised input and vector (mean 0, variance 1, no affine map); the
    weights are the softmax over the ``top_k`` best.

    Args:
        top_k (int): experts per token and module.
        prototypes (str): prototype set with the vectors; without one they are zero, and the first adapters win.
    """

    name: ClassVar[str] = "phatgoose"
    title: ClassVar[str] = "top-k per token by standardised gate vectors, each trained on its adapter's task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.05859"
    projects: ClassVar[bool] = False

    top_k: int = integer(2, at_least=1, help="experts per token and module")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the vectors ``(C, D_in)``, zeros before training."""
        start = torch.zeros(len(bank.ranks), bank.d_in)
        return Prepared(bank, {PROTOTYPES: trained_vectors(bank, adapters, known, self.prototypes, self.name, start)})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`."""
        selected, chosen = best(phatgoose_scores(tensors[PROTOTYPES], x), self.top_k)  # [..., K]
        return Gates(torch.softmax(selected, dim=-1), chosen)


def phatgoose_scores(vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Every candidate's score ``x' . v' / sqrt(D_in)``.

    Args:
        vectors (torch.Tensor): ``(C, D_in)``.
        x (torch.Tensor): inputs ``(..., D_in)``; token ids ``(...)`` stand for one-hot vectors.

    Returns:
        torch.Tensor: ``(..., C)``.
    """
    width, rows = vectors.shape[-1], standardise(vectors)
    if x.is_floating_point():
        return project(standardise(x), rows) * width**-0.5
    # Of a one-hot vector the variance is (D - 1) / D^2; rows of mean 0 do not see that its mean is taken off.
    return project(x, rows) * width**0.5 * max(width - 1, 1) ** -0.5
