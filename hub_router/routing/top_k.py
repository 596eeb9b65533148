"""Top-k with a fixed rule for ties."""

from __future__ import annotations

import torch


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest scores along the last axis; among equal scores the lowest index wins.

    ``torch.topk`` leaves the choice among equals open. Here each score becomes an integer that sorts as its float32
    value does, with the index below it, so that no two keys are equal.

    Args:
        scores (torch.Tensor): ``(..., C)``, compared in float32.
        k (int): how many; all C where C is smaller.

    Returns:
        torch.Tensor: int64 ``(..., K)`` with K = min(k, C), best first.
    """
    count = scores.shape[-1]
    # Adding zero turns -0.0 into 0.0, which would sort apart as bit patterns.
    bits = (scores.detach().to(torch.float32) + 0.0).contiguous().view(torch.int32)
    # Bit patterns of negative floats grow with the magnitude; flipping them makes the order that of the values.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ranks = torch.arange(count - 1, -1, -1, device=scores.device)
    keys = (ordered.to(torch.int64) << 32) | ranks  # [..., C]
    return keys.topk(min(k, count), dim=-1).indices
