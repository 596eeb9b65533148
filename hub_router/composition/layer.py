"""The child module that computes what a pool of adapters adds to one linear map of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.utils.hooks import RemovableHandle

from hub_router.composition.dora import gain
from hub_router.composition.maps import LinearMap
from hub_router.composition.stacked import candidate_weights, expert_weights, gate_step
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
        self.runs = 0
        self.state_names = tuple(prepared.tensors)
        B, gains, shifts = _absorb_gains(bank, adapted.weight)
        self.has_gains, self.has_shifts = gains is not None, shifts is not None
        tensors = {
            "A": bank.A,
            "B": B,
            "owners": bank.component_experts,
            "experts": torch.tensor(bank.experts, dtype=torch.int64),
            **({"gains": gains} if gains is not None else {}),
            **({"shifts": shifts} if shifts is not None else {}),
            **{_STATE + name: tensor for name, tensor in prepared.tensors.items()},
        }
        device, dtype = adapted.weight.device, adapted.weight.dtype
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
        self.runs += 1
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


def _absorb_gains(
    bank: ModuleBank, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """B with DoRA's gains in its rows; per candidate ``g - 1`` ``(C, D_out)``, and the bias ``(C, D_out)``."""
    extras = [bank.extras.get(expert) for expert in bank.experts]
    gains = [
        gain(weight, bank.A[part], bank.B[:, part], extra.magnitude)
        if extra is not None and extra.magnitude is not None
        else None
        for extra, part in zip(extras, bank.slices, strict=True)
    ]
    biases = [None if extra is None else extra.bias for extra in extras]
    wide = torch.promote_types(bank.B.dtype, torch.float32)
    B = bank.B
    if any(each is not None for each in gains):
        B = B.to(weight.device, wide).clone()
        for each, part in zip(gains, bank.slices, strict=True):
            if each is not None:
                B[:, part] *= each.to(wide).unsqueeze(1)
    zeros = torch.zeros(bank.d_out, device=weight.device, dtype=wide)
    shifts = [
        None if bias is None else bias.to(zeros) * (1.0 if each is None else each.to(zeros))
        for bias, each in zip(biases, gains, strict=True)
    ]
    less_one = [None if each is None else each.to(zeros) - 1.0 for each in gains]
    return B, _rows(less_one, zeros), _rows(shifts, zeros)


def _rows(vectors: Sequence[torch.Tensor | None], zeros: torch.Tensor) -> torch.Tensor | None:
    """The vectors as a matrix ``(C, D_out)``, zeros for None; None where all are None."""
    if all(each is None for each in vectors):
        return None
    return torch.stack([zeros if each is None else each for each in vectors])
