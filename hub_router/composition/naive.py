"""The truth: the same sum written with loops over tokens, experts and components. Tests compare the fast path to it."""

from __future__ import annotations

import torch

from hub_router.composition.stacked import dense_weights
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Merge


def naive_update(x: torch.Tensor, bank: ModuleBank, gates: Gates, merge: Merge) -> torch.Tensor:
    """What the gated adapters add to ``W x``, token by token.

    ``outputs``: sum_e w_e B_e (A_e x). ``factors``: (sum_e w_e B_e) (sum_f w_f A_f) x.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)``.
        bank (ModuleBank): the module's candidates.
        gates (Gates): for the tokens of x.
        merge (str): ``outputs`` or ``factors``.

    Returns:
        torch.Tensor: ``(..., D_out)``.
    """
    leading = x.shape[:-1]
    last = gates.weights.shape[-1] if gates.indices is None else len(bank.ranks)
    weights = gates.weights if gates.per == "component" else dense_weights(gates, len(bank.ranks))
    weights = weights.expand(*leading, last).reshape(-1, last)
    rows = []
    for token, row in zip(x.reshape(-1, bank.d_in), weights, strict=True):
        if gates.per == "component":
            rows.append(_by_component(token, bank, row))
        elif merge == "outputs":
            rows.append(_by_outputs(token, bank, row))
        else:
            rows.append(_by_factors(token, bank, row))
    return torch.stack(rows).reshape(*leading, bank.d_out) if rows else x.new_zeros(*leading, bank.d_out)


def _by_outputs(token: torch.Tensor, bank: ModuleBank, weights: torch.Tensor) -> torch.Tensor:
    total = token.new_zeros(bank.d_out)
    for weight, part in zip(weights, bank.slices, strict=True):
        total = total + weight * (bank.B[:, part] @ (bank.A[part] @ token))
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
