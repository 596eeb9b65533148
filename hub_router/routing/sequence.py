"""What the methods share that decide once per sequence: ranks of whole adapters, and scores by likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hub_router import gaussian
from hub_router.gaussian import Gaussian
from hub_router.lora.bank import AdapterBank


def adapter_ranks(pool: AdapterBank) -> torch.Tensor:
    """Components of each adapter as a whole: its largest rank over the modules.

    Args:
        pool (AdapterBank): every module's candidates.

    Returns:
        torch.Tensor: int64 ``(E,)``; 0 for an adapter that is a candidate nowhere.
    """
    ranks = [0] * len(pool.adapters)
    for bank in pool.modules.values():
        for expert, rank in zip(bank.experts, bank.ranks, strict=True):
            ranks[expert] = max(ranks[expert], rank)
    return torch.tensor(ranks, dtype=torch.int64)


def likelihood_state(pool: AdapterBank, gaussians: Sequence[Gaussian]) -> dict[str, torch.Tensor]:
    """What :func:`likelihoods` reads.

    Args:
        pool (AdapterBank): every module's candidates.
        gaussians (Sequence[Gaussian]): of every adapter, in pool order.

    Returns:
        dict[str, torch.Tensor]: ``means (E, D)`` and ``factors (E, K, D)`` in float64, ``ranks (E,)`` in int64.
    """
    means, factors = gaussian.stack(gaussians)
    return {
        "means": torch.from_numpy(means),
        "factors": torch.from_numpy(factors),
        "ranks": adapter_ranks(pool),
    }


def likelihoods(state: Mapping[str, torch.Tensor], embeddings: torch.Tensor, epsilon: float) -> np.ndarray:
    """HiLoRA's score ``s_e = log N(z; mean_e, covariance_e + epsilon I) / D`` of every adapter.

    Args:
        state (Mapping[str, torch.Tensor]): from :func:`likelihood_state`.
        embeddings (torch.Tensor): unit vectors z ``(B, D)``.
        epsilon (float): ridge on the covariance.

    Returns:
        np.ndarray: float64 ``(B, E)``; minus infinity for an adapter that is a candidate in no module.
    """
    means, factors, ranks = (state[name].numpy() for name in ("means", "factors", "ranks"))
    scores = gaussian.log_density(embeddings.numpy(), means, factors, epsilon) / means.shape[1]
    return np.where(ranks > 0, scores, -np.inf)
