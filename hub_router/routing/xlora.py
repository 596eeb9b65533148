"""``xlora``: weights per token and module from the hidden states of the base model, which reads the input first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import optional_integer, positive, set_name, validate
from hub_router.routing.project import project
from hub_router.routing.top_k import best
from hub_router.routing.trained import PROTOTYPES, trained_vectors


@dataclass(frozen=True)
class Xlora:
    """`X-LoRA <https://arxiv.org/abs/2402.07148>`_: ``w = softmax((V z + b) / temperature)`` for every module.

    z is the last hidden state of the token in a first pass of the base model, all adapters off. V and b are the
    module's part of a linear classifier (PEFT's with ``xlora_depth=1`` and ``layerwise_scalings``); a row of V and its
    number of b make one vector of a prototype set. A deeper classifier has no vector per adapter and is not offered.
    Before training both are zero, and w is 1/C.

    Args:
        top_k (int | None): adapters per token and module, of largest w, which is not renormalised; None for all.
        temperature (float): by which the scores are divided.
        prototypes (str): prototype set with the rows of V and b.
    """

    name: ClassVar[str] = "xlora"
    title: ClassVar[str] = "softmax per token of a trained classifier on the base model's hidden states"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.07148"
    projects: ClassVar[bool] = False
    reads: ClassVar[Literal["base"]] = "base"

    top_k: int | None = optional_integer(at_least=1, help="adapters per token and module; None for all")
    temperature: float = positive(1.0, help="by which the scores are divided")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; V with b as its last column, zeros before training."""
        start = torch.zeros(len(bank.ranks), known.width + 1)
        return Prepared(bank, {PROTOTYPES: trained_vectors(bank, adapters, known, self.prototypes, self.name, start)})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.OuterRouter`; x is z ``(..., D)``."""
        return self.gates(self.shares(tensors[PROTOTYPES], x))

    def shares(self, vectors: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The weight w of every candidate.

        Args:
            vectors (torch.Tensor): V with b as its last column ``(C, D + 1)``.
            z (torch.Tensor): hidden states ``(..., D)``.

        Returns:
            torch.Tensor: ``(..., C)``.
        """
        scores = project(z, vectors[:, :-1]) + vectors[:, -1]
        return torch.softmax(scores / self.temperature, dim=-1)

    def gates(self, shares: torch.Tensor) -> Gates:
        """The gates of these weights.

        Args:
            shares (torch.Tensor): w of every candidate ``(..., C)``.

        Returns:
            Gates: of all, or of the ``top_k``.
        """
        return Gates(shares) if self.top_k is None else Gates(*best(shares, self.top_k))
