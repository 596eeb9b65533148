"""``arrow``: per token and module, the adapters whose direction of largest variation the input points along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hub_router.errors import MethodError
from hub_router.features import ModuleFeatures
from hub_router.lora.adapter import LoraFactors
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.lora.spectrum import spectrum
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import select
from hub_router.routing.hyperparameters import integer, positive, validate
from hub_router.routing.project import project
from hub_router.routing.top_k import best


@dataclass(frozen=True)
class Arrow:
    """Arrow routing of `Towards Modular LLMs <https://arxiv.org/abs/2405.11157>`_, restated in SpectR's Eq. 2-5.

    The prototype ``p_e`` is the first right singular vector of B_e A_e. ``score_e = |p_e . x|`` on the raw x, free of
    the vector's sign; the ``top_k`` best share the token by ``softmax(score / temperature)``.

    Args:
        top_k (int): experts per token and module.
        temperature (float): divides the scores before the softmax.
    """

    name: ClassVar[str] = "arrow"
    title: ClassVar[str] = "top-k per token by |first right singular vector . x|, softmax weights"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.11157"
    projects: ClassVar[bool] = False

    top_k: int = integer(4, at_least=1, help="experts per token and module")
    temperature: float = positive(1.0, help="divides the scores before the softmax")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; ``P (C, D_in)`` from the catalog, or computed here."""
        directions: dict[int, torch.Tensor] = {}
        for number, (expert, part) in enumerate(zip(bank.experts, bank.slices, strict=True)):
            found = known.spectra.get(adapters[expert])
            if found is None:
                found = spectrum(bank.module, LoraFactors(bank.A[part], bank.B[:, part], 1.0))
            if found.direction is None:
                continue
            if found.direction.shape != (bank.d_in,):
                raise MethodError(
                    f"adapter {adapters[expert]!r}, module {bank.module}: the prototype has shape "
                    f"{found.direction.shape}, expected ({bank.d_in},); recompute it with hub-router index"
                )
            directions[number] = torch.as_tensor(found.direction)
        prototypes = torch.stack(list(directions.values())) if directions else bank.A.new_zeros(0, bank.d_in)
        return Prepared(select(bank, list(directions)), {"P": prototypes})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; SpectR's Eq. 5."""
        scores = project(x, tensors["P"]).abs()  # [..., C]
        selected, chosen = best(scores, self.top_k)  # [..., K]
        if self.temperature != 1.0:
            selected = selected / self.temperature
        return Gates(torch.softmax(selected, dim=-1), chosen)
