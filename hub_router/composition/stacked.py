"""The fast sum: two matrix products over the stacked bank, ``B (g * (A x))``, and the gate step between them."""

from __future__ import annotations

import torch

from hub_router.routing.base import Gates, Merge


def dense_weights(gates: Gates, candidates: int) -> torch.Tensor:
    """Expert weights with a place for every candidate.

    Args:
        gates (Gates): with ``per="expert"``.
        candidates (int): number C of candidates.

    Returns:
        torch.Tensor: ``(..., C)``, zero for those not chosen.
    """
    if gates.indices is None:
        return gates.weights
    none = gates.weights.new_zeros(*gates.weights.shape[:-1], candidates)
    return none.scatter(-1, gates.indices, gates.weights)


def gate_step(h: torch.Tensor, gates: Gates, owners: torch.Tensor, candidates: int, merge: Merge) -> torch.Tensor:
    """Turn ``h = A x`` into what B multiplies.

    ``outputs``: each component times its expert's weight. ``factors``: the candidates' mean projection
    ``m = sum_f w_f h_f`` ``(r,)`` in every candidate's place, times that candidate's weight.

    Args:
        h (torch.Tensor): stacked projections ``(..., R)``.
        gates (Gates): of the same tokens.
        owners (torch.Tensor): int64 ``(R,)``, each component's candidate.
        candidates (int): number C of candidates.
        merge (str): ``outputs`` or ``factors``; the latter with R = C r.

    Returns:
        torch.Tensor: ``(..., R)`` in h's dtype.
    """
    if gates.per == "component":
        return gates.weights.to(h.dtype) * h
    weights = dense_weights(gates, candidates).to(h.dtype)  # [..., C]
    if merge == "outputs":
        return weights.index_select(-1, owners) * h
    spread = weights.unsqueeze(-1)  # [..., C, 1]
    mean = (spread * h.unflatten(-1, (candidates, -1))).sum(-2, keepdim=True)  # [..., 1, r]
    return (spread * mean).flatten(-2)


def candidate_weights(gates: Gates, owners: torch.Tensor, candidates: int) -> torch.Tensor:
    """How much each candidate counts as a whole.

    Args:
        gates (Gates): of one module; a candidate gated by component counts with the mean of its components' gates.
        owners (torch.Tensor): int64 ``(R,)``, each component's candidate.
        candidates (int): number C of candidates.

    Returns:
        torch.Tensor: ``(..., C)``.
    """
    if gates.per == "expert":
        return dense_weights(gates, candidates)
    sums = gates.weights.new_zeros(*gates.weights.shape[:-1], candidates)
    return sums.index_add(-1, owners, gates.weights) / torch.bincount(owners, minlength=candidates)


def expert_weights(gates: Gates, owners: torch.Tensor, experts: torch.Tensor, pool: int) -> torch.Tensor:
    """Weights over the whole pool, for people to read.

    Args:
        gates (Gates): of one module; an expert gated by component counts with the mean of its components' gates.
        owners (torch.Tensor): int64 ``(R,)``, each component's candidate.
        experts (torch.Tensor): int64 ``(C,)``, each candidate's pool position.
        pool (int): number E of adapters.

    Returns:
        torch.Tensor: ``(..., E)``, zero for adapters that do not adapt the module.
    """
    weights = candidate_weights(gates, owners, experts.shape[0])
    return weights.new_zeros(*weights.shape[:-1], pool).index_copy(-1, experts, weights)
