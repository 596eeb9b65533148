"""``hilora-gs``: per sequence, whole adapters by how likely the input is among their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.gaussian import Gaussian
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.allocation import candidates, softmax
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import positive, validate
from hub_router.routing.sequence import likelihood_state, likelihoods


@dataclass(frozen=True)
class HiloraGs:
    """The first stage alone of `HiLoRA <https://arxiv.org/abs/2510.12266>`_, its baseline "HiLoRA-GS".

    Scores are Eq. 3's log-likelihoods over the number of dimensions, candidates C(x) those of Eq. 4; each gets the
    weight ``pi = softmax(score)`` over C(x) in every module that it adapts.

    Args:
        epsilon (float): ridge on the covariance; it sets the score's zero point, and with it how many are candidates.
    """

    name: ClassVar[str] = "hilora-gs"
    title: ClassVar[str] = "adapters per sequence by Gaussian likelihood of the text's embedding, softmax weights"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.12266"
    projects: ClassVar[bool] = False
    least_samples: ClassVar[int] = 2

    epsilon: float = positive(1e-5, help="ridge on the samples' covariance, sets the score's zero point")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the candidates' pool positions."""
        return Prepared(bank, {"experts": torch.tensor(bank.experts, dtype=torch.int64)})

    def plan_state(self, pool: AdapterBank, gaussians: Sequence[Gaussian]) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; the Gaussians and ranks."""
        return likelihood_state(pool, gaussians)

    def plan(
        self, state: Mapping[str, torch.Tensor], embeddings: torch.Tensor, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; pi of Sec. 3.2, nothing is drawn."""
        scores = likelihoods(state, embeddings, self.epsilon)
        weights = torch.zeros(scores.shape)
        for row, score in zip(weights, scores, strict=True):
            chosen = candidates(score)
            row[torch.from_numpy(chosen)] = torch.from_numpy(softmax(score[chosen])).to(row)
        return {"weights": weights}

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the plan's weights of the module's candidates."""
        return Gates(tensors["weights"].index_select(-1, tensors["experts"]))  # [..., C]

    def restrict(
        self, tensors: Mapping[str, torch.Tensor], numbers: torch.Tensor, components: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`."""
        return {"experts": tensors["experts"].index_select(0, numbers)}
