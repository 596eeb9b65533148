"""The fast sum ``B (g * (A x))``: over the whole stacked bank, or over the chosen components alone."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import linear

from hub_router.composition.grouped import can_group, grouped_update
from hub_router.composition.sparse import chosen_products, picks_without_copies, weighted_rows
from hub_router.routing.base import Gates, Merge

# A product with chosen rows runs at about a quarter of the speed of one with all rows.
_PACE = 4


class Factors(Protocol):
    """What is multiplied: a module's buffers, or those of some of its candidates.

    Attributes:
        A (torch.Tensor): down projections ``(R, D_in)``.
        Bt (torch.Tensor): up projections, transposed so that what belongs to a component lies together ``(R, D_out)``.
        owners (torch.Tensor): int64 ``(R,)``, each component's candidate.
        components (torch.Tensor): int64 ``(C, r_max)``, each candidate's components; where it has fewer, its first one.
        filled (torch.Tensor | None): ``(C, r_max)``, 0 where a candidate has fewer components; None for equal ranks.
        gains (torch.Tensor | None): DoRA's gain less 1 ``(C, D_out)``.
        shifts (torch.Tensor | None): biases ``(C, D_out)``.
        offsets (tuple[int, ...]): first component of each candidate, then R.
        candidates (int): number C.
    """

    @property
    def A(self) -> torch.Tensor: ...  # noqa: D102, N802
    @property
    def Bt(self) -> torch.Tensor: ...  # noqa: D102, N802
    @property
    def owners(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def components(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def filled(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def gains(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def shifts(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def offsets(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def candidates(self) -> int: ...  # noqa: D102


def is_sparse(gates: Gates, factors: Factors) -> bool:
    """Whether touching the chosen components alone costs less than two products over the whole bank.

    Args:
        gates (Gates): of one module.
        factors (Factors): the module's.

    Returns:
        bool: from shapes alone, the same for every token.
    """
    if gates.indices is None or factors.A.requires_grad or factors.Bt.requires_grad:
        return False
    width = 1 if gates.per == "component" else factors.components.shape[1]
    return _PACE * gates.indices.shape[-1] * width <= factors.A.shape[0]


def sparse_update(
    x: torch.Tensor, h: torch.Tensor | None, gates: Gates, factors: Factors, merge: Merge
) -> torch.Tensor:
    """What the chosen components add.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)`` in the factors' dtype.
        h (torch.Tensor | None): stacked projections ``(..., R)`` where they are known.
        gates (Gates): with indices, of the same tokens.
        factors (Factors): the module's.
        merge (str): ``outputs`` or ``factors``.

    Returns:
        torch.Tensor: ``(..., D_out)`` in the factors' dtype.
    """
    assert gates.indices is not None
    if h is None and can_group(x, gates, factors, merge):
        return grouped_update(x, gates, factors)
    if h is None and _is_one_token(x, gates):
        return _one_token(x, gates, factors, merge)
    leading, chosen = x.shape[:-1], gates.indices.shape[-1]
    if h is None and not picks_without_copies(x) and gates.indices.numel() * _PACE > factors.candidates:
        h = linear(x, factors.A)
    indices = gates.indices.reshape(-1, chosen)  # [N, K]
    weights = gates.weights.reshape(-1, chosen, 1).to(factors.A.dtype)  # [N, K, 1]
    if gates.per == "component":
        rows = indices
    else:
        rows = factors.components[indices].flatten(1)  # [N, K r]
        if factors.filled is not None:
            weights = weights * factors.filled[indices]  # [N, K, r]
    if h is None:
        picked = chosen_products(x.reshape(-1, x.shape[-1]), factors.A, rows)
    else:
        picked = h.reshape(-1, h.shape[-1]).gather(-1, rows)
    picked = picked.view(rows.shape[0], chosen, rows.shape[1] // chosen)  # [N, K, r]
    if merge == "factors":
        picked = (weights * picked).sum(1, keepdim=True)  # [N, 1, r]
    update = weighted_rows((weights * picked).flatten(1), factors.Bt, rows)
    return update.view(*leading, update.shape[1])


def _is_one_token(x: torch.Tensor, gates: Gates) -> bool:
    """Whether a call is a step of decoding on a CPU, of which no graph is made."""
    assert gates.indices is not None
    return (
        x.device.type == "cpu"
        and gates.per == "expert"
        and gates.indices.numel() == gates.indices.shape[-1]
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or gates.weights.requires_grad))
    )


def _one_token(x: torch.Tensor, gates: Gates, factors: Factors, merge: Merge) -> torch.Tensor:
    """:func:`sparse_update` of one token: the factors are read where they are, and what counts is the calls' number."""
    assert gates.indices is not None
    A, Bt, offsets, token = factors.A, factors.Bt, factors.offsets, x.reshape(-1)
    parts = [slice(offsets[number], offsets[number + 1]) for number in gates.indices.reshape(-1).tolist()]
    weights = gates.weights.reshape(-1).tolist()
    picked = [torch.mv(A[part], token) for part in parts]  # [r] each
    if merge == "factors":
        mean = sum(weight * each for weight, each in zip(weights, picked, strict=True))
        picked = [mean] * len(parts)
    update = Bt.new_zeros(Bt.shape[1])
    for weight, each, part in zip(weights, picked, parts, strict=True):
        torch.addmv(update, Bt[part].t(), each, alpha=weight, out=update)
    return update.view(*x.shape[:-1], update.shape[0])


def dense_weights(gates: Gates, count: int) -> torch.Tensor:
    """Weights with a place for everybody.

    Args:
        gates (Gates): of one module.
        count (int): number C of candidates, or R of components for gates per component.

    Returns:
        torch.Tensor: ``(..., C)`` or ``(..., R)``, zero for those not chosen.
    """
    if gates.indices is None:
        return gates.weights
    none = gates.weights.new_zeros(*gates.weights.shape[:-1], count)
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
        return dense_weights(gates, h.shape[-1]).to(h.dtype) * h
    weights = dense_weights(gates, candidates).to(h.dtype)  # [..., C]
    if merge == "outputs":
        return weights.index_select(-1, owners) * h
    spread = weights.unsqueeze(-1)  # [..., C, 1]
    mean = (spread * h.unflatten(-1, (candidates, -1))).sum(-2, keepdim=True)  # [..., 1, r]
    return (spread * mean).flatten(-2)


def weighted_candidates(gates: Gates, factors: Factors, table: torch.Tensor) -> torch.Tensor:
    """Each token's sum of its candidates' rows, such as biases.

    Args:
        gates (Gates): of one module.
        factors (Factors): the module's.
        table (torch.Tensor): a row for every candidate ``(C, D_out)``.

    Returns:
        torch.Tensor: ``(..., D_out)`` in the table's dtype; without leading axes where the gates have none.
    """
    if gates.per == "expert" and is_sparse(gates, factors):
        assert gates.indices is not None
        leading, chosen = gates.indices.shape[:-1], gates.indices.shape[-1]
        weights = gates.weights.reshape(-1, chosen).to(table.dtype)
        return weighted_rows(weights, table, gates.indices.reshape(-1, chosen)).view(*leading, table.shape[1])
    return candidate_weights(gates, factors.owners, factors.candidates).to(table.dtype) @ table


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
    weights = dense_weights(gates, owners.shape[0])
    sums = weights.new_zeros(*weights.shape[:-1], candidates)
    return sums.index_add(-1, owners, weights) / torch.bincount(owners, minlength=candidates)


def expert_weights(gates: Gates, factors: Factors, experts: torch.Tensor, pool: int) -> torch.Tensor:
    """Weights over the whole pool, for people to read.

    Args:
        gates (Gates): of one module; an expert gated by component counts with the mean of its components' gates.
        factors (Factors): the module's.
        experts (torch.Tensor): int64 ``(C,)``, each candidate's pool position.
        pool (int): number E of adapters.

    Returns:
        torch.Tensor: ``(..., E)``, zero for adapters that do not adapt the module.
    """
    weights = candidate_weights(gates, factors.owners, factors.candidates)
    return weights.new_zeros(*weights.shape[:-1], pool).index_copy(-1, experts, weights)
