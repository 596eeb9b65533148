"""One LoRA adapter in memory: two factors and a scaling per adapted module, and what was trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hub_router.errors import UnsupportedAdapterError


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The low-rank update ``scaling * (B A x + bias)`` of one linear map (LoRA, Eq. 3, https://arxiv.org/abs/2106.09685).

    With a magnitude m it is `DoRA's <https://arxiv.org/abs/2402.09353>`_ (Eq. 5): the map's rows are scaled to the
    lengths m, so with ``g = m / ||W + scaling B A||`` (row by row) the update is
    ``(g - 1) * (W x) + g * scaling * (B A x + bias)``.

    Args:
        A (torch.Tensor): down projection ``(r, D_in)``, as stored.
        B (torch.Tensor): up projection ``(D_out, r)``, as stored: the scaling is not in it.
        scaling (float): factor on B A, e.g. alpha/r or alpha/sqrt(r).
        magnitude (torch.Tensor | None): DoRA's row lengths ``(D_out,)``; None for plain LoRA.
        bias (torch.Tensor | None): bias of the up projection ``(D_out,)``; None where it has none.
        lookup (bool): the module is an embedding: x is the one-hot vector of a token id, D_in the vocabulary.

    Raises:
        UnsupportedAdapterError: the tensors' shapes do not belong to one map.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    lookup: bool = False

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise UnsupportedAdapterError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not chain, expected (r, D_in) and (D_out, r)"
            )
        for what, vector in (("DoRA magnitude", self.magnitude), ("bias of lora_B", self.bias)):
            if vector is not None and vector.shape != (self.d_out,):
                raise UnsupportedAdapterError(f"{what} has shape {tuple(vector.shape)}, expected ({self.d_out},)")

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

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors there are, by field name: A and B first."""
        found = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class SavedParameter:
    """A parameter of the base model in the values that were trained or saved along with an adapter.

    Args:
        value (torch.Tensor): as stored.
        apart (bool): whether it belongs to a module of ``modules_to_save``, of which PEFT trains a copy; otherwise it
            stands for the base model's own parameter, in every module that shares it.
    """

    value: torch.Tensor
    apart: bool


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
        saved (Mapping[str, SavedParameter]): parameters saved beside the factors (task heads, embeddings, biases), by
            parameter path in the base model; they take effect only where the adapter is used alone.
        not_stored (tuple[str, ...]): entries of ``modules_to_save`` for which there are no tensors.
    """

    name: str
    path: Path | None
    base_model: str | None
    modules: Mapping[str, LoraFactors]
    weights_hash: str
    notes: tuple[str, ...] = ()
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    saved: Mapping[str, SavedParameter] = field(default_factory=dict)
    not_stored: tuple[str, ...] = ()
