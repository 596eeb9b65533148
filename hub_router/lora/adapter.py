"""One LoRA adapter in memory: two factors and a scaling per adapted module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hub_router.errors import UnsupportedAdapterError


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The low-rank update ``scaling * B A`` of one linear map (LoRA, Eq. 3, https://arxiv.org/abs/2106.09685).

    Args:
        A (torch.Tensor): down projection ``(r, D_in)``, as stored.
        B (torch.Tensor): up projection ``(D_out, r)``, as stored: the scaling is not in it.
        scaling (float): factor on B A, e.g. alpha/r or alpha/sqrt(r).

    Raises:
        UnsupportedAdapterError: A and B are not two matrices that share the rank.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise UnsupportedAdapterError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not chain, expected (r, D_in) and (D_out, r)"
            )

    @property
    def rank(self) -> int:
        """Number of rank-one components r."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Input width of the adapted linear map."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Output width of the adapted linear map."""
        return self.B.shape[0]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter read from a folder.

    Args:
        name (str): the user's name of the adapter, unique within a pool.
        path (Path | None): folder that it was read from; None for one made in memory.
        base_model (str | None): base model as written in the config.
        modules (Mapping[str, LoraFactors]): factors by module path in the base model, in file order.
        weights_hash (str): identity of the function that the adapter computes.
        notes (tuple[str, ...]): what a user should know about this adapter, one line each.
        copies (Mapping[str, torch.Tensor]): weights of adapted modules that were saved along unchanged, by parameter
            path in the base model, whose own must be equal.
    """

    name: str
    path: Path | None
    base_model: str | None
    modules: Mapping[str, LoraFactors]
    weights_hash: str
    notes: tuple[str, ...] = ()
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
