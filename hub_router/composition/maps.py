"""The modules of a base model that an adapter can adapt, seen as linear maps ``W [D_out, D_in]``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hub_router.errors import IncompatibleAdaptersError
from hub_router.lora.weights import FLOAT_DTYPES


@dataclass(frozen=True)
class LinearMap:
    """A module as a linear map; a view, nothing is copied.

    Args:
        module (nn.Module): ``nn.Linear``, GPT-2's ``Conv1D`` or ``nn.Embedding``.
        lookup (bool): the input is token ids, which stand for one-hot vectors.
    """

    module: nn.Module
    lookup: bool

    @property
    def weight(self) -> torch.Tensor:
        """``(D_out, D_in)``, in the module's dtype."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.mT if self.lookup or isinstance(self.module, Conv1D) else weight

    @property
    def d_in(self) -> int:
        """Input width; the vocabulary of an embedding."""
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.weight.shape[0]


def linear_map(module: nn.Module) -> LinearMap | str:
    """A module as a linear map, or why it is none that can be adapted.

    Args:
        module (nn.Module): any module of a model.

    Returns:
        LinearMap | str: the map; else one line with what was got and what was expected.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it is the output map of a torch.nn.MultiheadAttention, which reads its weight without calling it"
    if isinstance(module, nn.Embedding):
        found = LinearMap(module, lookup=True)
        if module.max_norm is not None:
            return f"got {kind} with max_norm={module.max_norm}, which changes its weight when called"
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"got {kind}, an embedding with a forward of its own, expected torch.nn.Embedding"
    elif isinstance(module, nn.Linear | Conv1D):
        found = LinearMap(module, lookup=False)
    else:
        return f"got {kind}, expected torch.nn.Linear, transformers' Conv1D or torch.nn.Embedding"
    if found.weight.dtype not in FLOAT_DTYPES:
        return f"the model's weight is {found.weight.dtype}, expected a floating-point base model, not a quantised one"
    return found


def need_linear_map(model: nn.Module, name: str) -> LinearMap:
    """The map of that name, of a model that was checked.

    Args:
        model (nn.Module): the base model.
        name (str): module path.

    Returns:
        LinearMap: the map.

    Raises:
        IncompatibleAdaptersError: it is none.
    """
    found = linear_map(model.get_submodule(name))
    if isinstance(found, str):
        raise IncompatibleAdaptersError(type(model).__name__, [f"module {name}: {found}"])
    return found
