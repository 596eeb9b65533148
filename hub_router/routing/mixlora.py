"""``mixlora``: experts of a feed-forward block behind one top-k router, each with the whole block to itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import integer, set_name, validate
from hub_router.routing.project import project
from hub_router.routing.top_k import best
from hub_router.routing.trained import PROTOTYPES, trained_vectors

# Deviation of the gates before training, as the authors' program draws them.
_START = 0.02


@dataclass(frozen=True)
class Mixlora:
    """`MixLoRA <https://arxiv.org/abs/2404.15159>`_: ``y = sum_k w_k FFN_k(x)`` over the top k experts of a block.

    ``FFN_k`` is the base model's feed-forward block with the updates of expert k in all of its maps, and w the softmax
    of ``G x`` over all experts, of which the ``top_k`` are kept and divided by their sum. Not the maps' outputs are
    mixed but the block's, so that a block runs top_k times. The vectors of a prototype set are the rows of G, the same
    for all maps of a block. Before training they are small random numbers, for equal ones would leave most experts out.

    The paper has experts in feed-forward blocks alone. Adapters found elsewhere have other maps, too: each of those
    gets a router of its own, on its own input, and the experts' outputs are mixed.

    Args:
        top_k (int): experts per token and block.
        prototypes (str): prototype set with the rows of G.
    """

    name: ClassVar[str] = "mixlora"
    title: ClassVar[str] = "top-k experts per token and feed-forward block, their outputs mixed, by a trained router"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.15159"
    projects: ClassVar[bool] = False
    reads: ClassVar[Literal["block"]] = "block"

    top_k: int = integer(2, at_least=1, help="experts per token and feed-forward block")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; G ``(C, D)``, of the block's inputs."""
        width = known.width or bank.d_in
        generator = torch.Generator().manual_seed(zlib.crc32(block_of(bank.module).encode()))
        start = _START * torch.randn(len(adapters), width, generator=generator)[list(bank.experts)]
        return Prepared(bank, {PROTOTYPES: trained_vectors(bank, adapters, known, self.prototypes, self.name, start)})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.OuterRouter`; x is the block's input ``(..., D)``."""
        return self.gates(self.shares(tensors[PROTOTYPES], x))

    def shares(self, vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The share p of every expert.

        Args:
            vectors (torch.Tensor): G ``(C, D)``.
            x (torch.Tensor): the block's inputs ``(..., D)``.

        Returns:
            torch.Tensor: ``(..., C)``.
        """
        return torch.softmax(project(x, vectors), dim=-1)

    def gates(self, shares: torch.Tensor) -> Gates:
        """The gates of these shares.

        Args:
            shares (torch.Tensor): p of every expert ``(..., C)``.

        Returns:
            Gates: of the ``top_k``, with a sum of 1.
        """
        kept, chosen = best(shares, self.top_k)  # [..., K]
        return Gates(kept / kept.sum(-1, keepdim=True), chosen)


def block_of(module: str) -> str:
    """The module that holds a map.

    Args:
        module (str): path of the map.

    Returns:
        str: path of its parent.
    """
    return module.rpartition(".")[0]
