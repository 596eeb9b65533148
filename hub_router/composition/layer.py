"""The child module that computes what a pool of adapters adds to one linear map of the base model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.utils.hooks import RemovableHandle

from hub_router.composition.dora import gain
from hub_router.composition.maps import LinearMap
from hub_router.composition.outer import Outer
from hub_router.composition.plan import Plan, Planner
from hub_router.composition.stacked import (
    Factors,
    expert_weights,
    gate_step,
    is_sparse,
    sparse_update,
    weighted_candidates,
)
from hub_router.errors import RoutedStateError, UnsupportedAdapterError
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Merge, Prepared, Router, SequenceRouter
from hub_router.routing.project import as_typed

_STATE = "router_"
# A plan that leaves more than this share of the components in use is followed with all of them.
_MOST = 0.5


class Recorder(Protocol):
    """Takes the expert weights of every forward while someone traces."""

    def record(self, module: str, weights: torch.Tensor) -> None:
        """Keep ``weights`` ``(..., E)`` of one call of ``module``."""
        ...


@dataclass(frozen=True, eq=False)
class _Part:
    """Some candidates of a module: the factors, and the router's tensors, that a plan needs."""

    A: torch.Tensor
    Bt: torch.Tensor
    owners: torch.Tensor
    components: torch.Tensor
    filled: torch.Tensor | None
    gains: torch.Tensor | None
    shifts: torch.Tensor | None
    offsets: tuple[int, ...]
    experts: torch.Tensor
    state: Mapping[str, torch.Tensor]

    @property
    def candidates(self) -> int:
        """Number C of candidates."""
        return len(self.offsets) - 1


class _Whole:
    """All candidates of a module, read from its buffers without the module's slow look-up of attributes.

    Args:
        update (RoutedUpdate): whose buffers they are, wherever they are moved.
    """

    def __init__(self, update: RoutedUpdate) -> None:
        self._buffers: dict[str, Any] = update._buffers
        self._names = tuple((name, _STATE + name) for name in update.state_names)
        self.offsets = update.offsets

    A = property(lambda self: self._buffers["A"])
    Bt = property(lambda self: self._buffers["Bt"])
    owners = property(lambda self: self._buffers["owners"])
    components = property(lambda self: self._buffers["components"])
    filled = property(lambda self: self._buffers["filled"])
    gains = property(lambda self: self._buffers["gains"])
    shifts = property(lambda self: self._buffers["shifts"])
    experts = property(lambda self: self._buffers["experts"])

    @property
    def candidates(self) -> int:
        """Number C of candidates."""
        return len(self.offsets) - 1

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The router's tensors."""
        buffers = self._buffers
        return {name: buffers[key] for name, key in self._names}


class RoutedUpdate(nn.Module):
    """``B (g(x) * (A x))`` for one module, and what DoRA magnitudes and biases add; the base computes its own ``W x``.

    All tensors are non-persistent buffers: ``model.to(...)`` moves them, ``state_dict`` and ``save_pretrained`` do not
    see them. They have the dtype of the linear map, the router's at least float32.

    Args:
        router (Router): decides the gates.
        prepared (Prepared): the module's candidates, factors and router state.
        pool (int): number E of adapters in the pool.
        adapted (LinearMap): the linear map that is adapted.
        planner (Planner | None): where the router decides per sequence, who asks it.
    """

    A: torch.Tensor
    Bt: torch.Tensor
    owners: torch.Tensor
    components: torch.Tensor
    experts: torch.Tensor
    filled: torch.Tensor | None
    gains: torch.Tensor | None
    shifts: torch.Tensor | None
    shares: torch.Tensor | None

    def __init__(
        self, router: Router, prepared: Prepared, pool: int, adapted: LinearMap, planner: Planner | None = None
    ) -> None:
        super().__init__()
        bank = prepared.bank
        self.module = bank.module
        self.router = router
        self.planner = planner
        self.pool = pool
        self.candidates = len(bank.ranks)
        self.ranks = bank.ranks
        self.offsets = bank.offsets
        self.lookup = bank.lookup
        self.merge: Merge = prepared.merge
        # Factors that are the method's own are saved as they were made, before DoRA's gain.
        self.own_factors = (bank.A, bank.B) if prepared.own_factors else None
        self.outer: Outer | None = None
        self.recorder: Recorder | None = None
        self.handles: list[RemovableHandle] = []
        # Threads in which the module ran since its parent was last entered; None where no guard wants to know.
        self.ran: set[int] | None = None
        self.state_names = tuple(prepared.tensors)
        # Saved as computed: from weights that were rounded since, they could not be computed again.
        self.computed_gains, shifts = _gains(prepared, adapted), _shifts(bank)
        self.has_gains, self.has_shifts = self.computed_gains is not None, shifts is not None
        tensors = {
            "A": bank.A,
            "Bt": bank.B.mT,
            "owners": bank.component_experts,
            "components": bank.components,
            "filled": bank.filled,
            "experts": torch.tensor(bank.experts, dtype=torch.int64),
            "gains": None,
            "shifts": shifts,
            "shares": prepared.shares,
            **{_STATE + name: tensor for name, tensor in prepared.tensors.items()},
        }
        if self.computed_gains is not None:
            gains = self.computed_gains
            tensors["Bt"] = bank.B.mT.to(gains) * gains.index_select(0, bank.component_experts.to(gains.device))
            tensors["gains"] = gains - 1.0
            tensors["shifts"] = None if shifts is None else shifts.to(gains) * gains
        # The part of the module that the latest plan uses, and that plan.
        self._part: tuple[Plan, _Whole | _Part] | None = None
        self._put(tensors, adapted)
        self.whole = _Whole(self)

    def _put(self, tensors: Mapping[str, torch.Tensor | None], adapted: LinearMap) -> None:
        """Register the tensors where the linear map is, in its dtype."""
        device, dtype = adapted.device, adapted.dtype
        for name, tensor in tensors.items():
            if tensor is None:
                self.register_buffer(name, None, persistent=False)
                continue
            # Scores decide who is chosen, so what they are made from stays in full precision.
            exact = name.startswith(_STATE) or name == "shares"
            wanted = torch.promote_types(tensor.dtype, torch.float32) if exact else dtype
            kept = wanted if tensor.is_floating_point() else tensor.dtype
            cast = tensor.to(device=device, dtype=kept).contiguous()
            if kept == torch.float16 and not torch.isfinite(cast).all():
                raise UnsupportedAdapterError(
                    f"module {self.module}: values of the adapters' {name} exceed float16's largest, 65504; load the "
                    "base model in bfloat16 or float32"
                )
            self.register_buffer(name, cast, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutedUpdate:
        """Follow the model to a device or dtype; the router's tensors follow to the device alone."""
        before = self.state()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, _STATE + name)
            if after.dtype != tensor.dtype:
                setattr(self, _STATE + name, tensor.to(after.device))
        self._part = None
        return self

    def state(self) -> Mapping[str, torch.Tensor]:
        """The router's tensors of this module, under the names that its ``prepare`` gave them."""
        return self.whole.state

    def forward(
        self, x: torch.Tensor, base: torch.Tensor | None = None, scale: torch.Tensor | float | None = None
    ) -> torch.Tensor | None:
        """What the adapters add.

        Args:
            x (torch.Tensor): inputs of the linear map, ``(..., D_in)``, or token ids ``(...)`` of an embedding.
            base (torch.Tensor | None): ``W x`` without the base's bias, ``(..., D_out)``, where :attr:`has_gains`.
            scale (torch.Tensor | float | None): factor that the embedding applies to what it looks up.

        Returns:
            torch.Tensor | None: ``(..., D_out)``; None where nobody is a candidate, so that the base stays bit for bit.
        """
        if self.ran is not None:
            note_run(self)
        leading = x.shape if self.lookup else x.shape[:-1]
        if self.candidates == 0:
            if self.recorder is not None:
                self.recorder.record(self.module, self.Bt.new_zeros(*leading, self.pool))
            return None
        part: _Whole | _Part = self.whole
        state = part.state
        if self.planner is not None:
            part, rows = self._planned(leading)
            state = {**part.state, **rows}
        factors: Factors = part
        h = self._project(x, factors) if self.router.projects else None
        told: Gates | None
        if self.outer is None:
            gates = told = self.router.route(state, x, h)
        elif (found := self.outer.gates(self, leading, self.A.device)) is not None:
            gates, told = found
        else:
            return None
        if self.recorder is not None and told is not None:
            self._record(told, factors, part.experts, leading)
        update = self._sum(x, h, gates, factors)
        if factors.shifts is not None:
            update = update + weighted_candidates(gates, factors, factors.shifts)
        if factors.gains is not None:
            assert base is not None
            update = update + weighted_candidates(gates, factors, factors.gains) * base
        return update if scale is None else update * torch.as_tensor(scale).to(update)

    def _project(self, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        """``A x``, all of it ``(..., R)``."""
        return embedding(x, factors.A.mT) if self.lookup else linear(x, factors.A)

    def _sum(self, x: torch.Tensor, h: torch.Tensor | None, gates: Gates, factors: Factors) -> torch.Tensor:
        """The gated components' sum ``(..., D_out)``."""
        if is_sparse(gates, factors) and not self.lookup:
            with as_typed(x.device):
                return sparse_update(x, h, gates, factors, self.merge)
        h = self._project(x, factors) if h is None else h
        return gate_step(h, gates, factors.owners, factors.candidates, self.merge) @ factors.Bt

    def _record(self, gates: Gates, factors: Factors, experts: torch.Tensor, leading: torch.Size) -> None:
        assert self.recorder is not None
        if self.shares is None:
            weights = expert_weights(gates, factors, experts, self.pool).detach()
        else:
            weights = self.shares.to(torch.float32)
        self.recorder.record(self.module, weights.expand(*leading, self.pool))

    def _planned(self, leading: torch.Size) -> tuple[_Whole | _Part, dict[str, torch.Tensor]]:
        """The candidates that the plan at hand uses, and its rows beside the inputs."""
        assert self.planner is not None
        plan = self.planner.plan
        if plan is None:
            raise RoutedStateError(
                f"module {self.module}: method {self.router.name!r} decides by the text of its input, which the model "
                "reads; call the whole model, not a part of it"
            )
        held = self._part
        if held is None or held[0].rows is not plan.rows:
            held = self._part = (plan, self._restricted(plan))
        return held[1], plan.spread(self.module, leading, self.A.device)

    def _restricted(self, plan: Plan) -> _Whole | _Part:
        """What the plan needs of this module; everything, where that is most of it anyway."""
        used = plan.on(self.A.device)["weights"].index_select(-1, self.experts).any(0)  # [C]
        kept = used[self.owners]  # [R]
        if int(kept.count_nonzero()) > _MOST * self.A.shape[0]:
            return self.whole
        numbers, rows = (each.nonzero().squeeze(-1) for each in (used, kept))
        router = cast(SequenceRouter, self.router)
        place = torch.cumsum(kept, 0) - 1  # [R], where a kept component goes

        def some(table: torch.Tensor | None) -> torch.Tensor | None:
            return None if table is None else table.index_select(0, numbers)

        return _Part(
            A=self.A.index_select(0, rows),
            Bt=self.Bt.index_select(0, rows),
            owners=(torch.cumsum(used, 0) - 1)[self.owners.index_select(0, rows)],
            components=place[self.components.index_select(0, numbers)],
            filled=some(self.filled),
            gains=some(self.gains),
            shifts=some(self.shifts),
            offsets=(0, *accumulate(self.ranks[number] for number in numbers.tolist())),
            experts=self.experts.index_select(0, numbers),
            state=router.restrict(self.state(), numbers, rows),
        )


@torch.compiler.disable
def note_run(update: RoutedUpdate) -> None:
    """Note that an update ran in this thread; kept out of compiled graphs, which would be compiled anew each time.

    Args:
        update (RoutedUpdate): one that is guarded.
    """
    assert update.ran is not None
    update.ran.add(threading.get_ident())


def _gains(prepared: Prepared, adapted: LinearMap) -> torch.Tensor | None:
    """DoRA's gain of every candidate ``(C, D_out)``, 1 for plain LoRA; None where nobody is DoRA."""
    bank = prepared.bank
    magnitudes = [None if (extra := bank.extras.get(e)) is None else extra.magnitude for e in bank.experts]
    if prepared.gains is not None or all(each is None for each in magnitudes):
        return prepared.gains
    weight = adapted.weight
    ones = torch.ones(bank.d_out, device=weight.device, dtype=torch.promote_types(bank.B.dtype, torch.float32))
    return torch.stack(
        [
            ones if each is None else gain(weight, bank.A[part], bank.B[:, part], each).to(ones)
            for each, part in zip(magnitudes, bank.slices, strict=True)
        ]
    )


def _shifts(bank: ModuleBank) -> torch.Tensor | None:
    """Every candidate's bias ``(C, D_out)``, 0 for those without; None where nobody has one."""
    biases = [None if (extra := bank.extras.get(e)) is None else extra.bias for e in bank.experts]
    if all(each is None for each in biases):
        return None
    zeros = torch.zeros(bank.d_out, dtype=torch.promote_types(bank.B.dtype, torch.float32))
    return torch.stack([zeros if each is None else each.to(zeros) for each in biases])
