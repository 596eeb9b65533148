"""``retriever``: per sequence, the adapters whose samples' mean embedding is most like the input's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hub_router.features import ModuleFeatures
from hub_router.gaussian import Gaussian
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_averageable_factors
from hub_router.routing.hyperparameters import choice, integer, validate
from hub_router.routing.sequence import adapter_ranks
from hub_router.routing.top_k import top_k


@dataclass(frozen=True)
class Retriever:
    """`LoraRetriever <https://arxiv.org/abs/2402.09997>`_: whole adapters, chosen by the cosine of embeddings.

    ``score_e = cos(z, mean_e)`` of the input's instructed embedding and the mean of the adapter's sample embeddings.
    The ``top_k`` best get 1/k each in every module that they adapt; the k are chosen once, for the whole model.

    Args:
        top_k (int): adapters per sequence; with ``mode="selection"`` it is 1.
        mode (str): ``mixture``: mean of their outputs; ``fusion``: of their factors, which needs candidates of equal
            rank; ``selection``: the best alone.
    """

    name: ClassVar[str] = "retriever"
    title: ClassVar[str] = "top-k per sequence by cosine of the text's embedding, equal weights"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09997"
    projects: ClassVar[bool] = False
    least_samples: ClassVar[int] = 1

    top_k: int = integer(3, at_least=1, help="adapters per sequence")
    mode: str = choice(
        "mixture", among=("mixture", "fusion", "selection"), help="mean of outputs, mean of factors, or the best alone"
    )

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; ``mode="fusion"`` needs factors that can be averaged."""
        if self.mode == "fusion":
            need_averageable_factors(pool, "method 'retriever' with mode='fusion'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the candidates' pool positions."""
        tensors = {"experts": torch.tensor(bank.experts, dtype=torch.int64)}
        return Prepared(bank, tensors, "factors" if self.mode == "fusion" else "outputs")

    def plan_state(self, pool: AdapterBank, gaussians: Sequence[Gaussian]) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; the means at unit length."""
        means = torch.from_numpy(np.stack([each.mean for each in gaussians]).astype(np.float64))
        return {"directions": torch.nn.functional.normalize(means, dim=-1), "ranks": adapter_ranks(pool)}

    def plan(
        self, state: Mapping[str, torch.Tensor], embeddings: torch.Tensor, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`; 1/k for the k most alike, 0 for the others."""
        able = state["ranks"] > 0
        count = min(1 if self.mode == "selection" else self.top_k, int(able.sum()))
        weights = torch.zeros(embeddings.shape[0], able.shape[0])
        for row, embedding in zip(weights, embeddings, strict=True):
            scores = (state["directions"] @ embedding).masked_fill(~able, -torch.inf)
            row[top_k(scores, count)] = 1 / max(count, 1)
        return {"weights": weights}

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the plan's weights of the module's candidates."""
        return Gates(tensors["weights"].index_select(-1, tensors["experts"]))  # [..., C]

    def restrict(
        self, tensors: Mapping[str, torch.Tensor], numbers: torch.Tensor, components: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See :class:`~hub_router.routing.base.SequenceRouter`."""
        return {"experts": tensors["experts"].index_select(0, numbers)}
