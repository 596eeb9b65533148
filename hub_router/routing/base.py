"""The seam between a routing method and the engine: a router says who and how much, ``compose`` sums.

All methods are gates over rank-one components. With a module's stacked factors A ``(R, D_in)`` and B ``(D_out, R)``,
``h = A x`` and a gate ``g(x)`` ``(R,)`` the routed module computes ``y = W x + B (g * h)``; a method is its gate.

How the families fit:

- token level (Arrow, SpectR, LoRA-Mixer, PHATGOOSE, MAPLE): :meth:`Router.prepare` makes tensors, :meth:`Router.route`
  reads them. Trained gates are the same tensors with other values, so ``route`` takes them as an argument.
- other factors (SpectR): ``prepare`` returns a bank of its own in :class:`Prepared`.
- one update made of all adapters (merged, LEGO, KnOTS, PEFT's merges): ``prepare`` returns a bank of one candidate and
  the ``shares`` of the adapters in it.
- components (HiLoRA's rank-one components): gates with ``per="component"``.
- gates by what lies outside of the module (X-LoRA, MixLoRA): an :class:`OuterRouter` is given that in the place of x.
- sequence level (LoraRetriever, HiLoRA): a :class:`SequenceRouter` is asked for a plan once per sequence; its rows
  reach ``route`` in ``tensors``, one per leading index of x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from hub_router.features import ModuleFeatures
from hub_router.gaussian import Gaussian
from hub_router.lora.bank import AdapterBank, ModuleBank

Merge = Literal["outputs", "factors"]


@dataclass(frozen=True)
class Gates:
    """How much of each candidate a token gets; C is the number of candidates of the module.

    Args:
        weights (torch.Tensor): ``(..., C)``; ``(..., K)`` beside indices; ``(..., R)`` for ``per="component"``. The
            leading axes are those of x, or absent where the gate does not depend on the token.
        indices (torch.Tensor | None): int64 ``(..., K)``, the candidates that the K weights belong to, or with
            ``per="component"`` the components; others get 0.
        per (str): what a weight gates: an ``expert`` with all its components, or one rank-one ``component``.
    """

    weights: torch.Tensor
    indices: torch.Tensor | None = None
    per: Literal["expert", "component"] = "expert"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a method keeps of one module.

    Args:
        bank (ModuleBank): the candidates that take part, with the factors that the engine multiplies.
        tensors (Mapping[str, torch.Tensor]): the method's own state, handed back to ``route``.
        merge (str): ``outputs``: sum_e w_e B_e A_e x; ``factors``: (sum_e w_e B_e) (sum_f w_f A_f) x.
        own_factors (bool): whether the bank's factors are the method's and not the adapters' as they were read.
        gains (torch.Tensor | None): DoRA's gain of every candidate ``(C, D_out)``, 1 for plain LoRA; set where it was
            computed before, from base weights that may have been rounded since.
        shares (torch.Tensor | None): for one update made of many adapters, how much of every adapter of the pool went
            into it, ``(E,)``; the bank then holds a single candidate, under the pool position of any of them.
    """

    bank: ModuleBank
    tensors: Mapping[str, torch.Tensor]
    merge: Merge = "outputs"
    own_factors: bool = False
    gains: torch.Tensor | None = None
    shares: torch.Tensor | None = None


class Router(Protocol):
    """A routing method: a frozen dataclass whose fields are the paper's hyperparameters with the paper's defaults.

    Attributes:
        name (str): registry name, used by the command line and ``compose(method=...)``.
        title (str): one line that says what the gate is.
        paper (str): link to the paper, empty where there is none.
        projects (bool): whether ``route`` needs ``h = A x``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    projects: ClassVar[bool]

    def check(self, pool: AdapterBank) -> None:
        """Refuse a pool that the method cannot route over, before any base model is loaded or changed.

        Args:
            pool (AdapterBank): every module's candidates, those with a zero update left out.

        Raises:
            MethodError: names every offender.
        """
        ...

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """The adapters that can ever get a weight; heads and the like take effect only where one is used alone.

        Args:
            adapters (Sequence[str]): names of the pool.

        Returns:
            Sequence[str]: some or all of them.
        """
        ...

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """Make one module's state, once.

        Args:
            bank (ModuleBank): stacked factors of the module, at least one candidate.
            adapters (Sequence[str]): names of the pool; ``bank.experts`` are positions in it.
            known (ModuleFeatures): what is known of this module; may be empty.

        Returns:
            Prepared: candidates, tensors and how to sum.
        """
        ...

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """Gate one module's tokens; pure.

        Args:
            tensors (Mapping[str, torch.Tensor]): :attr:`Prepared.tensors`, on x's device.
            x (torch.Tensor): inputs of the module, ``(..., D_in)``; token ids ``(...)`` where it is an embedding (see
                :func:`hub_router.routing.project.project`).
            h (torch.Tensor | None): ``A x`` ``(..., R)`` with the prepared factors, where :attr:`projects`.

        Returns:
            Gates: weights in float32 or wider.
        """
        ...


@runtime_checkable
class OuterRouter(Router, Protocol):
    """A method that gates a module's tokens by something else than the module's input.

    Its ``route`` gets that in the place of x; the tensors are the module's. It never asks for ``h``.

    Attributes:
        reads (str): ``base``: the last hidden states ``(..., D)`` of the base model, which reads the input first with
            all adapters off. ``block``: the input ``(..., D)`` of the feed-forward block that the module is part of;
            the K chosen candidates then each get the whole block, whose outputs are summed with their weights. A module
            that is part of none is gated by its own input.
    """

    reads: ClassVar[Literal["base", "block"]]


@runtime_checkable
class SequenceRouter(Router, Protocol):
    """A method that decides once per input sequence which adapters take part, from an embedding of its text.

    It needs samples of every adapter's task and a sentence encoder.

    Attributes:
        least_samples (int): different samples of every adapter's task that it needs at least.
    """

    least_samples: ClassVar[int]

    def plan_state(self, pool: AdapterBank, gaussians: Sequence[Gaussian]) -> dict[str, torch.Tensor]:
        """What :meth:`plan` reads; saved with a composition.

        Args:
            pool (AdapterBank): every module's candidates.
            gaussians (Sequence[Gaussian]): of the embedded samples of every adapter, in pool order.

        Returns:
            dict[str, torch.Tensor]: on the CPU.
        """
        ...

    def plan(
        self, state: Mapping[str, torch.Tensor], embeddings: torch.Tensor, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Decide for each sequence by itself: a row never depends on the rows beside it.

        Args:
            state (Mapping[str, torch.Tensor]): from :meth:`plan_state`.
            embeddings (torch.Tensor): unit vectors of the sequences' texts, float64 ``(B, D)``.
            seeds (Sequence[int]): a number per sequence, made from its text, for those that draw.

        Returns:
            dict[str, torch.Tensor]: ``(B, ...)``; columns of adapters follow the pool. At :meth:`Router.route` they
            stand in ``tensors`` under the same names, as ``(B, 1, ...)`` for x ``(B, T, D_in)``. Of the key ``weights``
            ``(B, E)`` an adapter with 0 in all rows takes no part in the batch.
        """
        ...

    def restrict(
        self, tensors: Mapping[str, torch.Tensor], numbers: torch.Tensor, components: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One module's state for those candidates alone that a batch's plans use; the plan's rows stay as they are.

        Args:
            tensors (Mapping[str, torch.Tensor]): :attr:`Prepared.tensors`, on x's device.
            numbers (torch.Tensor): candidates that are kept (0 .. C-1, not pool positions), int64, ascending.
            components (torch.Tensor): rows of A that are kept, all those of these candidates, int64, ascending.

        Returns:
            dict[str, torch.Tensor]: what ``prepare`` would have made of the smaller bank.
        """
        ...
