"""``hilora``: per sequence a budget of rank-one components for likely adapters, per token the strongest components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hub_router.features import ModuleFeatures
from hub_router.gaussian import Gaussian
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.allocation import allocate
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_gateable_components
from hub_router.routing.hyperparameters import fraction, integer, positive, validate
from hub_router.routing.sequence import likelihood_state, likelihoods
from hub_router.routing.top_k import top_k


@dataclass(frozen=True)
class Hilora:
    """`HiLoRA <https://arxiv.org/abs/2510.12266>`_: components allotted per sequence, and chosen per token.

    Sec. 3.2: Eq. 3 scores the adapters, Eq. 4 chooses candidates, and o_e of their components are drawn, O in all
    (:mod:`hub_router.routing.allocation`). Sec. 3.3: in every module each token takes the o_e components of adapter e
    with the largest ``a . x``, signed, and their sum is multiplied by ``sqrt(mean rank of the candidates / O)``. An
    adapter's rank is its largest over the modules; where a module's is smaller, o_e is capped there, and O stays.

    In half precision ``a . x`` is the product that B multiplies, rounded once; among components that it makes equal the
    first wins.

    Args:
        gamma (float): share of the candidates' components that a sequence gets.
        epsilon (float): ridge on the covariance; it sets the score's zero point, and with it how many are candidates.
        seed (int): of the draws, together with each sequence's text.
    """

    name: ClassVar[str] = "hilora"
    title: ClassVar[str] = "components per adapter drawn by Gaussian likelihood of the text, chosen per token by a . x"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.12266"
    projects: ClassVar[bool] = True
    least_samples: ClassVar[int] = 2

    gamma: float = fraction(0.4, help="share of the candidates' components that a sequence gets")
    epsilon: float = positive(1e-5, help="ridge on the samples' covariance, sets the score's zero point")
    seed: int = integer(0, at_least=0, help="of the draws, together with each sequence's text")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; updates must be no more than their components."""
        need_gateable_components(pool, f"method {self.name!r}", "hilora-gs")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; where each component goes in a table ``(C, r_max)``."""
        owners, steps = bank.component_experts, torch.arange(max(bank.ranks), device=bank.A.device)
        firsts = torch.tensor(bank.offsets[:-1], dtype=torch.int64, device=bank.A.device)
        within = torch.arange(owners.shape[0], device=bank.A.device) - firsts[owners]
        tensors = {
            "experts": torch.tensor(bank.experts, dtype=torch.int64),
            "places": owners * steps.shape[0] + within,  # [R]
            "steps": steps,  # [r_max]
        }
        return Prepared(bank, tensors)

    def plan_state(self, pool: AdapterBank, gaussians: Sequence[Gaussian]) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; the Gaussians and ranks."""
        return likelihood_state(pool, gaussians)

    def plan(
        self, state: Mapping[str, torch.Tensor], embeddings: torch.Tensor, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; ``weights`` are o_e, ``scale`` is sqrt(r_mean / O)."""
        ranks = state["ranks"].numpy()
        weights, scale = torch.zeros(len(seeds), len(ranks)), torch.ones(len(seeds), 1)
        for number, scores in enumerate(likelihoods(state, embeddings, self.epsilon)):
            allocation = allocate(scores, ranks, self.gamma, np.random.default_rng((self.seed, seeds[number])))
            weights[number] = torch.from_numpy(allocation.counts)
            if allocation.budget:
                scale[number] = (allocation.mean_rank / allocation.budget) ** 0.5
        return {"weights": weights, "scale": scale}

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; J_i of Sec. 3.3, times the scale."""
        assert h is not None
        places, steps, experts = tensors["places"], tensors["steps"], tensors["experts"]
        table = h.detach().to(torch.promote_types(h.dtype, torch.float32))
        ragged = table.shape[-1] != experts.shape[0] * steps.shape[0]
        if ragged:
            none = table.new_full((*table.shape[:-1], experts.shape[0] * steps.shape[0]), -torch.inf)
            table = none.index_copy(-1, places, table)
        table = table.unflatten(-1, (experts.shape[0], steps.shape[0]))  # [..., C, r_max]
        order = top_k(table, steps.shape[0])
        quotas = tensors["weights"].index_select(-1, experts).unsqueeze(-1)  # [..., C, 1]
        taken = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, (steps < quotas).expand_as(order))
        taken = taken.flatten(-2)
        if ragged:
            taken = taken.index_select(-1, places)
        return Gates(taken * tensors["scale"], per="component")  # [..., R]

    def restrict(
        self, tensors: Mapping[str, torch.Tensor], numbers: torch.Tensor, components: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; kept candidates move up in the table."""
        width = tensors["steps"].shape[0]
        places = tensors["places"].index_select(0, components)
        owners = torch.searchsorted(numbers, places // width)
        return {
            "experts": tensors["experts"].index_select(0, numbers),
            "places": owners * width + places % width,
            "steps": tensors["steps"],
        }
