"""Balance losses: what a router pays for how it spreads tokens over experts.

Of one module, ``p`` are the experts' shares of each token ``(N, C)`` (softmax over all candidates), ``p_bar`` their
mean over tokens, and ``f_bar`` each expert's share of all top-k slots, which carries no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch

from hub_router.errors import TrainingError

_SMALLEST = 1e-30


@dataclass(frozen=True, eq=False)
class Spread:
    """How one module spread the tokens of a batch.

    Args:
        shares (torch.Tensor): p ``(N, C)``, rows that sum to 1.
        slots (torch.Tensor): f_bar ``(C,)``, sums to 1.
    """

    shares: torch.Tensor
    slots: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """p_bar ``(C,)``."""
        return self.shares.mean(0)

    @property
    def entropy(self) -> torch.Tensor:
        """Mean over tokens of H(p) in nats, scalar (LoRA-Mixer, Eq. 6)."""
        return entropy(self.shares).mean()


class BalanceLoss(Protocol):
    """A loss on one module's spread; its fields are its coefficients."""

    name: ClassVar[str]

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """The loss.

        Args:
            spread (Spread): of one module.
            ramp (float): 0 .. 1, how far the coefficients have risen.

        Returns:
            torch.Tensor: scalar.
        """
        ...


@dataclass(frozen=True)
class Auxiliary:
    """``alpha sum_i p_bar_i f_bar_i``, the load balance of sparse mixtures (`LoRA-Mixer`_, Eq. 3).

    .. _LoRA-Mixer: https://arxiv.org/abs/2507.00029

    Args:
        alpha (float): its coefficient.
    """

    name: ClassVar[str] = "aux"
    alpha: float = 0.1

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """See :class:`BalanceLoss`."""
        return ramp * self.alpha * (spread.mean * spread.slots).sum()


@dataclass(frozen=True)
class Specialisation:
    """Routing Specialisation Balance Loss, ``alpha sum_i p_bar_i f_bar_i - lambda E[H(p)]`` (`LoRA-Mixer`_, Eq. 5).

    Minimising it as printed raises the entropy, while the text around it says that it is lowered. ``entropy`` chooses.

    .. _LoRA-Mixer: https://arxiv.org/abs/2507.00029

    Args:
        alpha (float): coefficient of the balance (A.8).
        entropy_weight (float): lambda (A.8; A.6 has 0.5).
        entropy (str): ``maximise`` as Eq. 5 prints it, or ``minimise`` as the text says.
    """

    name: ClassVar[str] = "rsl"
    alpha: float = 0.1
    entropy_weight: float = 0.05
    entropy: str = "maximise"

    def __post_init__(self) -> None:
        if self.entropy not in ("maximise", "minimise"):
            raise TrainingError(f"balance loss 'rsl': entropy={self.entropy!r}, expected 'maximise' or 'minimise'")

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """See :class:`BalanceLoss`."""
        sign = -1.0 if self.entropy == "maximise" else 1.0
        return ramp * (self.alpha * (spread.mean * spread.slots).sum() + sign * self.entropy_weight * spread.entropy)


@dataclass(frozen=True)
class MutualInformation:
    """`DS-MoE <https://arxiv.org/abs/2404.05567>`_'s ``alpha (E[H(p)] - H(p_bar))``: even load, sure of each token.

    Args:
        alpha (float): its coefficient.
    """

    name: ClassVar[str] = "ds-moe"
    alpha: float = 0.1

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """See :class:`BalanceLoss`."""
        return ramp * self.alpha * (spread.entropy - entropy(spread.mean))


BALANCE_LOSSES: Mapping[str, type[BalanceLoss]] = MappingProxyType(
    {loss.name: loss for loss in (Auxiliary, Specialisation, MutualInformation)}
)


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions along the last axis.

    Args:
        shares (torch.Tensor): ``(..., C)``, sums to 1.

    Returns:
        torch.Tensor: nats ``(...)``; 0 log 0 is 0, with a finite gradient.
    """
    return -(shares * shares.clamp_min(_SMALLEST).log()).sum(-1)
