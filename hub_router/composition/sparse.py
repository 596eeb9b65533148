"""Two products that touch only chosen rows of a matrix: scalar products with them, and weighted sums of them.

With ``k r`` chosen components a token costs ``k r (D_in + D_out)``, with the whole bank ``R (D_in + D_out)``. Each is
the other's gradient, so both are differentiable as often as wanted in all but the matrix. Under ``torch.compile`` and
where a gradient is wanted they are operators of their own, which a graph takes in as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.functional import embedding_bag

# Copied rows of one block of tokens, in elements, where the rows have to be copied before they are multiplied.
_BLOCK = 1 << 22

with warnings.catch_warnings():
    # Said once per process, when the first matrix of this kind is made: that its interface may change.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


def chosen_products(x: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scalar products of each token with the rows chosen for it.

    Args:
        x (torch.Tensor): tokens ``(N, D)``.
        matrix (torch.Tensor): ``(R, D)`` in x's dtype; not differentiated.
        rows (torch.Tensor): int64 ``(N, J)``, each below R.

    Returns:
        torch.Tensor: ``(N, J)``.
    """
    return (_products_operator if _needs_operator(x) else _products)(x, matrix, rows)


def weighted_rows(weights: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum of the rows chosen for it.

    Args:
        weights (torch.Tensor): ``(N, J)`` in the matrix's dtype.
        matrix (torch.Tensor): ``(R, D)``; not differentiated.
        rows (torch.Tensor): int64 ``(N, J)``, each below R.

    Returns:
        torch.Tensor: ``(N, D)``.
    """
    return (_sums_operator if _needs_operator(weights) else _sums)(weights, matrix, rows)


def picks_without_copies(x: torch.Tensor) -> bool:
    """Whether :func:`chosen_products` reads the chosen rows where they are; else it copies them first.

    Args:
        x (torch.Tensor): tokens.

    Returns:
        bool: on a CPU in single or double precision.
    """
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _needs_operator(tokens: torch.Tensor) -> bool:
    """Whether a graph is being made; where none is, the call of an operator would cost more than a small product."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and tokens.requires_grad)


def _products(x: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    tokens, chosen = rows.shape
    if picks_without_copies(x):
        starts = torch.arange(0, tokens * chosen + 1, max(chosen, 1))
        # Zeros, for what is in the matrix counts even where beta is 0, if it happens not to be a number.
        nothing = x.new_zeros(tokens * chosen)
        where = torch.sparse_csr_tensor(
            starts, rows.reshape(-1), nothing, (tokens, matrix.shape[0]), check_invariants=False
        )
        return torch.sparse.sampled_addmm(where, x, matrix.mT, beta=0.0).values().view(tokens, chosen)
    parts = [
        torch.bmm(matrix[some], each.unsqueeze(-1)).squeeze(-1)
        for some, each in zip(*(part.split(_tokens_per_block(matrix, chosen)) for part in (rows, x)), strict=True)
    ]
    return torch.cat(parts) if parts else x.new_empty(0, chosen)


def _sums(weights: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    tokens, chosen = rows.shape
    if tokens == 0 or chosen == 0:
        return matrix.new_zeros(tokens, matrix.shape[1])
    return embedding_bag(rows, matrix, per_sample_weights=weights, mode="sum")


def _tokens_per_block(matrix: torch.Tensor, chosen: int) -> int:
    return max(1, _BLOCK // max(1, chosen * matrix.shape[1]))


_products_operator = torch.library.custom_op("hub_router::chosen_products", _products, mutates_args=())
_sums_operator = torch.library.custom_op("hub_router::weighted_rows", _sums, mutates_args=())


@_products_operator.register_fake
def _(x: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.new_empty(rows.shape)


@_sums_operator.register_fake
def _(weights: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return matrix.new_empty(rows.shape[0], matrix.shape[1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    _, matrix, rows = inputs
    ctx.save_for_backward(matrix, rows)


def _products_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    matrix, rows = ctx.saved_tensors
    return _sums_operator(gradient.contiguous(), matrix, rows), None, None


def _sums_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    matrix, rows = ctx.saved_tensors
    return _products_operator(gradient.contiguous(), matrix, rows), None, None


_products_operator.register_autograd(_products_gradient, setup_context=_keep)
_sums_operator.register_autograd(_sums_gradient, setup_context=_keep)
