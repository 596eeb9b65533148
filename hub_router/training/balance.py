"""Balance losses: what a router pays for how it spreads tokens over experts.

Of one module, ``p`` are the experts' shares of each token ``(N, C)`` (softmax over all candidates), ``p_bar`` their
mean over tokens, and ``f_bar`` each expert's share of all top-k slots, which carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch

from hub_router.errors import TrainingError
from hub_router.routing.entropy import entropy

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


@dataclass(frozen=True)
class Variance:
    """`AESL`_'s ``alpha sum_i p_bar_i f_bar_i - gamma mean_n mean_i (p_ni - p_bar_i)^2``: even load, tokens apart.

    The variance of each expert's share over the tokens is the paper's variance loss, here its mean over tokens, so that
    a batch's size does not weigh. Its orthogonality loss is left out: it is one of the experts' outputs, which the
    router's shares do not say, and the experts are frozen here.

    .. _AESL: https://arxiv.org/abs/2505.22323

    Args:
        alpha (float): coefficient of the balance.
        gamma (float): coefficient of the variance.
    """

    name: ClassVar[str] = "aesl"
    alpha: float = 0.1
    gamma: float = 0.1

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """See :class:`BalanceLoss`."""
        variance = (spread.shares - spread.mean).square().mean()
        return ramp * (self.alpha * (spread.mean * spread.slots).sum() - self.gamma * variance)


@dataclass(frozen=True)
class PoissonNormal:
    """`GMoE <https://arxiv.org/abs/2412.16216>`_: each token's shares like a Poisson law, the load like a normal one.

    ``distinction E_n[D(q, sort p_n)] + alpha D(g, sort p_bar)`` with ``D(a, b) = sum_i a_i |log(a_i / b_i)|``, where
    all are in descending order, q is the Poisson law of ``rate`` at 1 .. C and g the normal one of mean and deviation
    C/2 at 0 .. C - 1, both made to sum to 1. D has the absolute values of the authors' program.

    Left out, as no functions of one batch's shares: the graph that their router is; the load of all steps before, in
    the place of which stands p_bar; and learning the two laws' parameters, which stay at their first values.

    Args:
        alpha (float): coefficient of the normal part.
        distinction (float): coefficient of the Poisson part.
        rate (float): of the Poisson law; from 0 to 2 it descends.
    """

    name: ClassVar[str] = "gmoe"
    alpha: float = 0.1
    distinction: float = 0.1
    rate: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 2:
            raise TrainingError(f"balance loss 'gmoe': rate={self.rate!r}, expected a number above 0, at most 2")

    def __call__(self, spread: Spread, ramp: float) -> torch.Tensor:
        """See :class:`BalanceLoss`."""
        places = torch.arange(spread.shares.shape[-1], device=spread.shares.device, dtype=spread.shares.dtype)
        poisson = torch.softmax((places + 1) * math.log(self.rate) - torch.lgamma(places + 2), dim=-1)
        half = len(places) / 2
        normal = torch.softmax(-0.5 * ((places - half) / half).square(), dim=-1).sort(descending=True).values
        apart = _apart(poisson, spread.shares).mean()
        return ramp * (self.distinction * apart + self.alpha * _apart(normal, spread.mean))


def _apart(target: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """D of a target and shares in descending order ``(...)``."""
    ordered = shares.sort(dim=-1, descending=True).values.clamp_min(_SMALLEST)
    return (target * (target.log() - ordered.log()).abs()).sum(-1)


BALANCE_LOSSES: Mapping[str, type[BalanceLoss]] = MappingProxyType(
    {loss.name: loss for loss in (Auxiliary, Specialisation, MutualInformation, PoissonNormal, Variance)}
)
