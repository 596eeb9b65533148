"""The truth: the same sum written with loops over tokens, experts and components. Tests compare the fast path to it."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from hub_router.composition.stacked import dense_weights
from hub_router.lora.bank import Extra, ModuleBank
from hub_router.routing.base import Gates, Merge


def naive_update(
    x: torch.Tensor, bank: ModuleBank, gates: Gates, merge: Merge, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """What the gated adapters add to ``W x``, token by token.

    ``outputs``: sum_e w_e (B_e (A_e x) + b_e), with DoRA's gain g_e (https://arxiv.org/abs/2402.09353, Eq. 5)
    sum_e w_e ((g_e - 1) * (W x) + g_e * (B_e (A_e x) + b_e)). ``factors``: (sum_e w_e B_e) (sum_f w_f A_f) x.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)``, or token ids ``(...)`` of an embedding.
        bank (ModuleBank): the module's candidates.
        gates (Gates): for the tokens of x.
        merge (str): ``outputs`` or ``factors``.
        weight (torch.Tensor | None): the base's W ``(D_out, D_in)``, without which there is no DoRA.

    Returns:
        torch.Tensor: ``(..., D_out)``.
    """
    if bank.lookup:
        x = one_hot(x, bank.d_in).to(bank.A.dtype)
    leading = x.shape[:-1]
    last = bank.A.shape[0] if gates.per == "component" else len(bank.ranks)
    weights = dense_weights(gates, last).expand(*leading, last).reshape(-1, last)
    rows = []
    for token, row in zip(x.reshape(-1, bank.d_in), weights, strict=True):
        if gates.per == "component":
            rows.append(_by_component(token, bank, row))
        elif merge == "outputs":
            rows.append(_by_outputs(token, bank, row, weight))
        else:
            rows.append(_by_factors(token, bank, row))
    return torch.stack(rows).reshape(*leading, bank.d_out) if rows else x.new_zeros(*leading, bank.d_out)


def _by_outputs(
    token: torch.Tensor, bank: ModuleBank, weights: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    total = token.new_zeros(bank.d_out)
    for share, expert, part in zip(weights, bank.experts, bank.slices, strict=True):
        extra = bank.extras.get(expert, Extra())
        update = bank.B[:, part] @ (bank.A[part] @ token)
        if extra.bias is not None:
            update = update + extra.bias
        if extra.magnitude is not None:
            assert base is not None
            gain = extra.magnitude / (base + bank.B[:, part] @ bank.A[part]).norm(dim=1)
            update = (gain - 1) * (base @ token) + gain * update
        total = total + share * update
    return total


def _by_factors(token: torch.Tensor, bank: ModuleBank, weights: torch.Tensor) -> torch.Tensor:
    rank = bank.ranks[0]
    A = token.new_zeros(rank, bank.d_in)
    B = token.new_zeros(bank.d_out, rank)
    for weight, part in zip(weights, bank.slices, strict=True):
        A = A + weight * bank.A[part]
        B = B + weight * bank.B[:, part]
    return B @ (A @ token)


def _by_component(token: torch.Tensor, bank: ModuleBank, weights: torch.Tensor) -> torch.Tensor:
    total = token.new_zeros(bank.d_out)
    for component, weight in enumerate(weights):
        total = total + weight * bank.B[:, component] * (bank.A[component] @ token)
    return total
