"""The gated sum with tokens grouped by adapter: two grouped matrix products, for many tokens on a GPU.

On a GPU a product with rows picked per token waits for memory. Sorted by adapter, the tokens of each meet its factors
once, in :func:`torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grouped_mm

from hub_router.routing.base import Gates, Merge

if TYPE_CHECKING:
    from hub_router.composition.stacked import Factors

# Below so many tokens per adapter, groups are too small to be worth the sorting.
_LEAST = 1.0
# Rows of what is multiplied have to begin at multiples of so many bytes.
_ALIGNED = 16


def can_group(x: torch.Tensor, gates: Gates, factors: Factors, merge: Merge) -> bool:
    """Whether the tokens of a call are to be grouped: on CUDA, whole adapters of one rank, and enough of them.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)``.
        gates (Gates): with indices, of the same tokens.
        factors (Factors): the module's.
        merge (str): ``outputs`` or ``factors``.

    Returns:
        bool: from shapes alone.
    """
    if not x.is_cuda or gates.indices is None or gates.per == "component" or merge == "factors":
        return False
    widths = (factors.components.shape[1], factors.A.shape[1], factors.Bt.shape[1])
    return (
        factors.filled is None
        and factors.A.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(width * factors.A.element_size() % _ALIGNED == 0 for width in widths)
        and gates.indices.numel() >= _LEAST * factors.candidates
    )


def grouped_update(x: torch.Tensor, gates: Gates, factors: Factors) -> torch.Tensor:
    """What the chosen adapters add, ``sum_e w_e B_e A_e x``.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)`` in the factors' dtype.
        gates (Gates): with indices, per expert, of the same tokens.
        factors (Factors): all candidates of one rank.

    Returns:
        torch.Tensor: ``(..., D_out)`` in the factors' dtype.
    """
    assert gates.indices is not None
    chosen, rank = gates.indices.shape[-1], factors.components.shape[1]
    experts, order = gates.indices.reshape(-1).sort(stable=True)  # [N K]
    tokens = order // chosen
    # Where each adapter's tokens end; adapters without any end where the one before does.
    ends = torch.searchsorted(experts, torch.arange(factors.candidates, device=x.device), right=True).to(torch.int32)
    flat = x.reshape(-1, x.shape[-1])
    down = factors.A.view(-1, rank, factors.A.shape[1]).mT  # [C, D_in, r]
    up = factors.Bt.view(-1, rank, factors.Bt.shape[1])  # [C, r, D_out]
    weights = gates.weights.reshape(-1, 1)[order].to(flat.dtype)  # [N K, 1]
    picked = grouped_mm(flat[tokens], down, offs=ends) * weights
    update = flat.new_zeros(flat.shape[0], up.shape[-1])
    return update.index_add(0, tokens, grouped_mm(picked, up, offs=ends)).view(*x.shape[:-1], up.shape[-1])
