"""Top-k with a fixed rule for ties."""

from __future__ import annotations

from itertools import pairwise

import torch


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest scores along the last axis; among equal scores the lowest index wins.

    ``torch.topk`` leaves the choice among equals open. Where the k + 1 best of every row differ there is nothing to
    choose; else each score becomes an integer that sorts as its float32 value does, with the index below it, so that no
    two are equal.

    Args:
        scores (torch.Tensor): ``(..., C)``, compared in float32.
        k (int): how many; all C where C is smaller.

    Returns:
        torch.Tensor: int64 ``(..., K)`` with K = min(k, C), best first.
    """
    return best(scores, k)[1]


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores themselves, which gradients go through, and their indices as :func:`top_k` chooses them.

    Args:
        scores (torch.Tensor): ``(..., C)``, compared in float32.
        k (int): how many; all C where C is smaller.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: scores in their dtype and int64 indices, ``(..., K)``, best first.
    """
    plain = scores.dtype == torch.float32 and not scores.requires_grad
    compared = scores if plain else scores.detach().to(torch.float32)
    count = scores.shape[-1]
    k = min(k, count)
    # To look at values costs a graph break when compiled, and on a GPU a wait for it.
    if not torch.compiler.is_compiling() and scores.device.type == "cpu":
        values, indices = compared.topk(min(k + 1, count), dim=-1)
        if _all_differ(values):
            chosen = indices.narrow(-1, 0, k)
            return (values.narrow(-1, 0, k) if plain else scores.gather(-1, chosen)), chosen
    chosen = _by_keys(compared, k)
    return scores.gather(-1, chosen), chosen


def _all_differ(values: torch.Tensor) -> bool:
    """Whether values sorted along the last axis differ from their neighbours; numbers that are none do not."""
    if values.numel() == values.shape[-1]:
        row = values.view(-1).tolist()
        return all(after < before for before, after in pairwise(row))
    return bool((values[..., 1:] < values[..., :-1]).all())


def _by_keys(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The same, of float32 scores, through int64 keys."""
    # Adding zero turns -0.0 into 0.0, which would sort apart as bit patterns.
    bits = (scores + 0.0).view(torch.int32)
    # Bit patterns of negative floats grow with the magnitude; flipping them makes the order that of the values.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ranks = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = (ordered.to(torch.int64) << 32) | ranks  # [..., C]
    return keys.topk(k, dim=-1).indices
