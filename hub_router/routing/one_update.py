"""What the methods share that make one update of all adapters, once: its bank, and the gate that lets it through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Prepared


def one_update(
    bank: ModuleBank, A: torch.Tensor, B: torch.Tensor, shares: torch.Tensor, adapters: Sequence[str]
) -> Prepared:
    """A module's state where a single update stands for all candidates.

    Args:
        bank (ModuleBank): the module's candidates, C of them.
        A (torch.Tensor): merged down projection ``(R', D_in)``.
        B (torch.Tensor): merged up projection ``(D_out, R')``.
        shares (torch.Tensor): how much of each candidate went into it, ``(C,)``.
        adapters (Sequence[str]): names of the pool.

    Returns:
        Prepared: a bank of one candidate, under the pool position of the first, and the shares of the pool.
    """
    merged = replace(
        bank,
        A=A.to(bank.A).contiguous(),
        B=B.to(bank.B).mT.contiguous().mT,
        ranks=(A.shape[0],),
        experts=bank.experts[:1],
        extras={},
    )
    places = torch.tensor(bank.experts, dtype=torch.int64, device=shares.device)
    pool = torch.zeros(len(adapters), device=shares.device).index_copy(0, places, shares.to(torch.float32))  # [E]
    return Prepared(merged, {}, own_factors=True, shares=pool)


def whole(x: torch.Tensor) -> Gates:
    """The gate of the only candidate: all of it, whatever the input.

    Args:
        x (torch.Tensor): inputs of the module, for their device and dtype.

    Returns:
        Gates: ``(1,)``.
    """
    return Gates(x.new_ones(1, dtype=torch.promote_types(x.dtype, torch.float32)))
