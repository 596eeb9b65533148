"""Entropy of shares: how sure a router is."""

from __future__ import annotations

import torch

# Its logarithm is finite, so that the gradient is where a share is 0.
_SMALLEST = 1e-30


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions along the last axis (`LoRA-Mixer <https://arxiv.org/abs/2507.00029>`_, Eq. 6).

    Args:
        shares (torch.Tensor): ``(..., C)``, sums to 1.

    Returns:
        torch.Tensor: nats ``(...)``; 0 log 0 is 0, with a finite gradient.
    """
    return -(shares * shares.clamp_min(_SMALLEST).log()).sum(-1)
