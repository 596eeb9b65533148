"""Gates while they are trained: a recipe's rule in the place of the method's, over vectors that take a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch

from hub_router.composition.attach import routed_updates
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.outer import by_decider
from hub_router.errors import TrainingError
from hub_router.routing.base import Gates, Router
from hub_router.routing.entropy import entropy
from hub_router.routing.trained import PROTOTYPES
from hub_router.training.balance import Spread


@dataclass(frozen=True, eq=False)
class ModuleState:
    """What a recipe's rule sees of one module.

    Args:
        vectors (torch.Tensor): the trained vectors ``(C', D_in)``, those of ``rows``.
        rows (torch.Tensor): int64 ``(C',)``, their candidates (0 .. C-1), ascending.
        experts (torch.Tensor): int64 ``(C,)``, each candidate's pool position.
        own (torch.Tensor): int64 ``(..., 1)``, pool position of each token's own adapter.
        tensors (Mapping[str, torch.Tensor]): all of the method's state, its vectors as they were before training.
        h (torch.Tensor | None): ``A x`` ``(..., R)``, where the method projects.
    """

    vectors: torch.Tensor
    rows: torch.Tensor
    experts: torch.Tensor
    own: torch.Tensor
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    h: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What a rule says of one module's tokens.

    Args:
        gates (Gates): the gates.
        shares (torch.Tensor | None): p of all candidates ``(..., C)``, where the rule makes them.
        chosen (torch.Tensor | None): int64 ``(..., K)``, the candidates of largest p.
    """

    gates: Gates
    shares: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


class Gate(Protocol):
    """A recipe's rule for one module's tokens; pure."""

    def __call__(self, state: ModuleState, x: torch.Tensor) -> Decision:
        """Gate tokens.

        Args:
            state (ModuleState): of the module.
            x (torch.Tensor): its inputs ``(..., D_in)``, or token ids ``(...)``.

        Returns:
            Decision: for every token.
        """
        ...


@dataclass(eq=False)
class Reading:
    """The batch that the model is reading, and what its modules said of it.

    Attributes:
        own (torch.Tensor): int64 ``(B,)``, each sequence's own adapter.
        masks (Sequence[torch.Tensor]): 1 for tokens, 0 for padding ``(B, T)``, of every text that the model reads.
        spreading (bool): whether modules keep how they spread the tokens, for a balance loss.
        observing (bool): whether they keep the entropy of their weights.
        spreads (list[Spread]): of the forward at hand, a module each.
        entropies (list[torch.Tensor]): mean over tokens, nats.
    """

    own: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    masks: Sequence[torch.Tensor] = ()
    spreading: bool = False
    observing: bool = False
    spreads: list[Spread] = field(default_factory=list)
    entropies: list[torch.Tensor] = field(default_factory=list)

    def begin(
        self, own: torch.Tensor, masks: Sequence[torch.Tensor], *, spreading: bool, observing: bool
    ) -> tuple[list[Spread], list[torch.Tensor]]:
        """Look at another batch.

        Args:
            own (torch.Tensor): see above.
            masks (Sequence[torch.Tensor]): see above; of different widths.
            spreading (bool): see above.
            observing (bool): see above.

        Returns:
            tuple[list[Spread], list[torch.Tensor]]: where the modules put their spreads and entropies until
                :meth:`close`.
        """
        self.own, self.masks, self.spreading, self.observing = own, masks, spreading, observing
        self.spreads, self.entropies = [], []
        return self.spreads, self.entropies

    def close(self) -> None:
        """Forget what comes: a backward that runs the forward again does the same once more, and says nothing new."""
        self.spreads, self.entropies = [], []

    def own_of(self, leading: Sequence[int], device: torch.device) -> torch.Tensor:
        """Each token's own adapter.

        Args:
            leading (Sequence[int]): ``(B, T)`` or, flattened, ``(B T,)``.
            device (torch.device): the module's.

        Returns:
            torch.Tensor: int64 ``(..., 1)``.
        """
        count = int(torch.Size(leading).numel())
        if count % max(self.own.shape[0], 1):
            raise TrainingError(
                f"a module sees inputs of shape {tuple(leading)} in a batch of {self.own.shape[0]} sequences, so it "
                "cannot be told which adapter's task each token is of; leave adapters of this module out"
            )
        return self.own.to(device).repeat_interleave(count // self.own.shape[0]).view(*leading, 1)

    def note(self, decision: Decision) -> None:
        """Keep what one module did."""
        weights, shares, chosen = decision.gates.weights, decision.shares, decision.chosen
        kept = self._real(weights)
        if self.observing:
            self.entropies.append(entropy(weights.detach()[kept]).mean())
        if self.spreading and shares is not None and chosen is not None:
            slots = torch.bincount(chosen[kept].flatten(), minlength=shares.shape[-1]).to(shares)
            self.spreads.append(Spread(shares[kept], slots / slots.sum()))

    def _real(self, weights: torch.Tensor) -> torch.Tensor:
        """Which tokens are no padding, where that is known; as an index of the leading axes."""
        leading = weights.shape[:-1]
        for mask in self.masks:
            if leading.numel() == mask.numel():
                return mask.to(weights.device).bool().view(leading)
        return torch.ones(leading, dtype=torch.bool, device=weights.device)


class Trainable(Protocol):
    """What the loop trains of one module."""

    @property
    def stored(self) -> torch.Tensor:
        """The module's own tensor, written to by :meth:`put`."""
        ...

    def select(self, experts: Sequence[int]) -> torch.Tensor | None:
        """Train the vectors of some adapters alone.

        Args:
            experts (Sequence[int]): pool positions.

        Returns:
            torch.Tensor | None: the leaf that takes the gradient; None where there is none of them.
        """
        ...

    def put(self) -> None:
        """Write what was trained into the module."""
        ...


class TrainedGate:
    """Stands in a module's update for its router, as long as its vectors are trained.

    Args:
        updates (Sequence[RoutedUpdate]): of the module, and of those that it decides for, whose vectors are its own;
            the router of the first is put back by :func:`training`.
        gate (Gate): the recipe's rule.
        reading (Reading): shared by all modules.
    """

    name: ClassVar[str] = "training"
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __init__(self, updates: Sequence[RoutedUpdate], gate: Gate, reading: Reading) -> None:
        update = updates[0]
        self.router: Router = update.router
        self.projects = update.router.projects
        self._update = update
        self._gate = gate
        self._reading = reading
        self._updates = updates
        self.rows = torch.arange(update.candidates, device=update.A.device)
        self.vectors = update.state()[PROTOTYPES].detach().clone()

    def select(self, experts: Sequence[int]) -> torch.Tensor | None:
        """Train the vectors of some adapters alone.

        Args:
            experts (Sequence[int]): pool positions.

        Returns:
            torch.Tensor | None: the leaf that takes the gradient ``(C', D_in)``; None where they are no candidates.
        """
        kept = torch.isin(self._update.experts, torch.tensor(list(experts), device=self._update.experts.device))
        self.rows = kept.nonzero().squeeze(-1)
        self.vectors = self.stored.index_select(0, self.rows).clone()
        if not self.rows.numel():
            return None
        return self.vectors.requires_grad_()

    def put(self) -> None:
        """Write the trained vectors into the module."""
        self.store(self.stored.index_copy(0, self.rows, self.vectors.detach()))

    def store(self, vectors: torch.Tensor) -> None:
        """Write vectors into the module, and into all that follow it.

        Args:
            vectors (torch.Tensor): of all candidates ``(C, D)``.
        """
        for update in self._updates:
            rows = torch.searchsorted(self._update.experts, update.experts)
            update.state()[PROTOTYPES].copy_(vectors.index_select(0, rows))

    @property
    def experts(self) -> list[int]:
        """Pool positions of the candidates whose vectors are trained ``(C',)``."""
        return self._update.experts.index_select(0, self.rows).tolist()

    @property
    def stored(self) -> torch.Tensor:
        """The module's own vectors ``(C, D_in)``, written to by :meth:`put`."""
        return self._update.state()[PROTOTYPES]

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the recipe's rule."""
        leading = x.shape[:-1] if x.is_floating_point() else x.shape
        own = self._reading.own_of(leading, x.device)
        state = ModuleState(self.vectors, self.rows, self._update.experts, own, tensors, h)
        decision = self._gate(state, x)
        if self._reading.observing or self._reading.spreading:
            self._reading.note(decision)
        return decision.gates


@contextmanager
def training(model: Any, gate: Gate, reading: Reading) -> Iterator[dict[str, TrainedGate]]:
    """Let a recipe's rule gate a routed model, whose parameters take no gradient meanwhile; an error changes no gate.

    Args:
        model (PreTrainedModel): a routed model's.
        gate (Gate): the rule.
        reading (Reading): told of every batch.

    Yields:
        dict[str, TrainedGate]: by module path, those with candidates; of a block that is gated as a whole, one.
    """
    shared = by_decider(update for _, update in routed_updates(model) if update.candidates)
    gates = {name: TrainedGate(updates, gate, reading) for name, updates in shared.items()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    before = {name: each.stored.clone() for name, each in gates.items()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for name, updates in shared.items():
            updates[0].router = cast(Router, gates[name])
        yield gates
    except BaseException:
        for name, each in gates.items():
            each.store(before[name])
        raise
    finally:
        for name, updates in shared.items():
            updates[0].router = gates[name].router
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
