"""``hilora-roc``: per token and module, the strongest rank-one components of the whole pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_gateable_components
from hub_router.routing.hyperparameters import integer, validate
from hub_router.routing.top_k import top_k


@dataclass(frozen=True)
class HiloraRoc:
    """The second stage alone of `HiLoRA <https://arxiv.org/abs/2510.12266>`_, its baseline "HiLoRA-ROC".

    Of all the module's components the k with the largest ``a . x``, signed, take part, each with the gate
    ``sqrt(mean rank of the candidates / k)``; k is ``top_rocs``, or all where there are fewer. In half precision
    ``a . x`` is the product that B multiplies, rounded once.

    Args:
        top_rocs (int): components per token and module.
    """

    name: ClassVar[str] = "hilora-roc"
    title: ClassVar[str] = "top-k components per token by a . x, over the whole pool"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.12266"
    projects: ClassVar[bool] = True

    top_rocs: int = integer(24, at_least=1, help="components per token and module")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; updates must be no more than their components."""
        need_gateable_components(pool, f"method {self.name!r}", "arrow")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the gate of a chosen component ``(1,)``."""
        total = sum(bank.ranks)
        scale = (total / len(bank.ranks) / min(self.top_rocs, total)) ** 0.5
        return Prepared(bank, {"scale": torch.tensor([scale])})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; Sec. 3.3 with one list of all components."""
        assert h is not None
        chosen = top_k(h, self.top_rocs)  # [..., K]
        return Gates(tensors["scale"].expand(chosen.shape), chosen, per="component")
