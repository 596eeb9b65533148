"""The child module that computes what a pool of adapters adds to one linear map of the base model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.utils.hooks import RemovableHandle

from hub_router.composition.dora import gain
from hub_router.composition.maps import LinearMap
from hub_router.composition.stacked import candidate_weights, expert_weights, gate_step
from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Merge, Prepared, Router

_STATE = "router_"


class Recorder(Protocol):
    """Takes the expert weights of every forward while someone traces."""

    def record(self, module: str, weights: torch.Tensor) -> None:
        """Keep ``weights`` ``(..., E)`` of one call of ``module``."""
        ...


class RoutedUpdate(nn.Module):
    """``B (g(x) * (A x))`` for one module, and what DoRA magnitudes and biases add; the base computes its own ``W x``.

    All tensors are non-persistent buffers: ``model.to(...)`` moves them, ``state_dict`` and ``save_pretrained`` do not
    see them. They have the dtype of the linear map, the router's at least float32.

    Args:
        router (Router): decides the gates.
        prepared (Prepared): the module's candidates, factors and router state.
        pool (int): number E of adapters in the pool.
        adapted (LinearMap): the linear map that is adapted.
    """

    A: torch.Tensor
    B: torch.Tensor
    owners: torch.Tensor
    experts: torch.Tensor
    gains: torch.Tensor
    shifts: torch.Tensor

    def __init__(self, router: Router, prepared: Prepared, pool: int, adapted: LinearMap) -> None:
        super().__init__()
        bank = prepared.bank
        self.module = bank.module
        self.router = router
        self.pool = pool
        self.candidates = len(bank.ranks)
        self.ranks = bank.ranks
        self.lookup = bank.lookup
        self.merge: Merge = prepared.merge
        # Factors that are the method's own are saved as they were made, before DoRA's gain.
        self.own_factors = (bank.A, bank.B) if prepared.own_factors else None
        self.recorder: Recorder | None = None
        self.handles: list[RemovableHandle] = []
        # Threads in which the module ran since its parent was last entered; None where no guard wants to know.
        self.ran: set[int] | None = None
        self.state_names = tuple(prepared.tensors)
        # Saved as computed: from weights that were rounded since, they could not be computed again.
        self.computed_gains, shifts = _gains(prepared, adapted.weight), _shifts(bank)
        self.has_gains, self.has_shifts = self.computed_gains is not None, shifts is not None
        tensors = {
            "A": bank.A,
            "B": bank.B,
            "owners": bank.component_experts,
            "experts": torch.tensor(bank.experts, dtype=torch.int64),
            **{_STATE + name: tensor for name, tensor in prepared.tensors.items()},
        }
        if self.computed_gains is not None:
            gains = self.computed_gains
            tensors["B"] = bank.B.to(gains) * gains.index_select(0, bank.component_experts.to(gains.device)).mT
            tensors["gains"] = gains - 1.0
            shifts = None if shifts is None else shifts.to(gains) * gains
        if shifts is not None:
            tensors["shifts"] = shifts
        device, dtype = adapted.weight.device, adapted.weight.dtype
        for name, tensor in tensors.items():
            # Scores decide who is chosen, so what they are made from stays in full precision.
            wanted = torch.promote_types(tensor.dtype, torch.float32) if name.startswith(_STATE) else dtype
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
        return self

    def state(self) -> Mapping[str, torch.Tensor]:
        """The router's tensors of this module, under the names that its ``prepare`` gave them."""
        return {name: getattr(self, _STATE + name) for name in self.state_names}

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
                self.recorder.record(self.module, self.B.new_zeros(*leading, self.pool))
            return None
        h = embedding(x, self.A.mT) if self.lookup else linear(x, self.A)  # [..., R]
        gates = self.router.route(self.state(), x, h if self.router.projects else None)
        if self.recorder is not None:
            weights = expert_weights(gates, self.owners, self.experts, self.pool).detach()
            self.recorder.record(self.module, weights.expand(*leading, self.pool))
        update = linear(gate_step(h, gates, self.owners, self.candidates, self.merge), self.B)
        if self.has_gains or self.has_shifts:
            shares = candidate_weights(gates, self.owners, self.candidates).to(update.dtype)  # [..., C]
            if self.has_shifts:
                update = update + shares @ self.shifts
            if self.has_gains:
                assert base is not None
                update = update + (shares @ self.gains) * base
        return update if scale is None else update * torch.as_tensor(scale).to(update)


@torch.compiler.disable
def note_run(update: RoutedUpdate) -> None:
    """Note that an update ran in this thread; kept out of compiled graphs, which would be compiled anew each time.

    Args:
        update (RoutedUpdate): one that is guarded.
    """
    assert update.ran is not None
    update.ran.add(threading.get_ident())


def _gains(prepared: Prepared, weight: torch.Tensor) -> torch.Tensor | None:
    """DoRA's gain of every candidate ``(C, D_out)``, 1 for plain LoRA; None where nobody is DoRA."""
    bank = prepared.bank
    magnitudes = [None if (extra := bank.extras.get(e)) is None else extra.magnitude for e in bank.experts]
    if prepared.gains is not None or all(each is None for each in magnitudes):
        return prepared.gains
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
