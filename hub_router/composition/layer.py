"""The child module that computes what a pool of adapters adds to one linear map of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from hub_router.composition.stacked import expert_weights, gate_step
from hub_router.routing.base import Merge, Prepared, Router

_STATE = "router_"


class Recorder(Protocol):
    """Takes the expert weights of every forward while someone traces."""

    def record(self, module: str, weights: torch.Tensor) -> None:
        """Keep ``weights`` ``(..., E)`` of one call of ``module``."""
        ...


class RoutedUpdate(nn.Module):
    """``B (g(x) * (A x))`` for one module; the base's own ``W x`` is not computed here.

    All tensors are non-persistent buffers: ``model.to(...)`` moves them, ``state_dict`` and ``save_pretrained`` do not
    see them. A and B have the dtype of the linear map, the router's tensors at least float32.

    Args:
        router (Router): decides the gates.
        prepared (Prepared): the module's candidates, factors and router state.
        pool (int): number E of adapters in the pool.
        device (torch.device): of the linear map that is adapted.
        dtype (torch.dtype): of the linear map that is adapted.
    """

    A: torch.Tensor
    B: torch.Tensor
    owners: torch.Tensor
    experts: torch.Tensor

    def __init__(self, router: Router, prepared: Prepared, pool: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        bank = prepared.bank
        self.module = bank.module
        self.router = router
        self.pool = pool
        self.candidates = len(bank.ranks)
        self.ranks = bank.ranks
        self.merge: Merge = prepared.merge
        self.own_factors = prepared.own_factors
        self.recorder: Recorder | None = None
        self.handle: RemovableHandle | None = None
        self.state_names = tuple(prepared.tensors)
        tensors = {
            "A": bank.A,
            "B": bank.B,
            "owners": bank.component_experts,
            "experts": torch.tensor(bank.experts, dtype=torch.int64),
            **{_STATE + name: tensor for name, tensor in prepared.tensors.items()},
        }
        for name, tensor in tensors.items():
            # Scores decide who is chosen, so what they are made from stays in full precision.
            wanted = torch.promote_types(tensor.dtype, torch.float32) if name.startswith(_STATE) else dtype
            kept = wanted if tensor.is_floating_point() else tensor.dtype
            self.register_buffer(name, tensor.to(device=device, dtype=kept).contiguous(), persistent=False)

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

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the adapters add.

        Args:
            x (torch.Tensor): inputs of the linear map, ``(..., D_in)``.

        Returns:
            torch.Tensor | None: ``(..., D_out)``; None where nobody is a candidate, so that the base stays bit for bit.
        """
        if self.candidates == 0:
            if self.recorder is not None:
                self.recorder.record(self.module, x.new_zeros(*x.shape[:-1], self.pool))
            return None
        h = linear(x, self.A)  # [..., R]
        gates = self.router.route(self.state(), x, h if self.router.projects else None)
        if self.recorder is not None:
            weights = expert_weights(gates, self.owners, self.experts, self.pool).detach()
            self.recorder.record(self.module, weights.expand(*x.shape[:-1], self.pool))
        return linear(gate_step(h, gates, self.owners, self.candidates, self.merge), self.B)
