"""The modules of a base model that an adapter can adapt, seen as linear maps ``W [D_out, D_in]``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
        module (nn.Module): ``nn.Linear``, one that bitsandbytes quantised, GPT-2's ``Conv1D`` or ``nn.Embedding``.
        lookup (bool): the input is token ids, which stand for one-hot vectors.
        computes (torch.dtype | None): the dtype of a quantised module's inputs; None where it is the weight's.
    """

    module: nn.Module
    lookup: bool
    computes: torch.dtype | None = None

    @property
    def weight(self) -> torch.Tensor:
        """``(D_out, D_in)``, in the module's dtype; of a quantised module a new tensor in full precision."""
        if is_quantised(self.module):
            return _dequantised(self.module)
        weight = self._stored
        return weight.mT if self.lookup or isinstance(self.module, Conv1D) else weight

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self._stored.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs, and of what is added to its outputs."""
        return self._stored.dtype if self.computes is None else self.computes

    @property
    def d_in(self) -> int:
        """Input width; the vocabulary of an embedding."""
        return self._widths[1]

    @property
    def d_out(self) -> int:
        """Output width."""
        return self._widths[0]

    @property
    def _stored(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def _widths(self) -> tuple[int, int]:
        if isinstance(self.module, nn.Linear):
            return self.module.out_features, self.module.in_features
        height, width = self._stored.shape
        return width, height


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
    if found.dtype not in FLOAT_DTYPES and not is_quantised(module):
        return (
            f"the model's weight is {found.dtype}, expected a floating-point base model, or one that "
            "bitsandbytes quantised"
        )
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
    if not is_quantised(found.module):
        return found
    return replace(found, computes=next(each.dtype for each in model.parameters() if each.is_floating_point()))


def is_quantised(module: nn.Module) -> bool:
    """Whether bitsandbytes holds a module's weight in 4 or 8 bits.

    Args:
        module (nn.Module): any module of a model.

    Returns:
        bool: so.
    """
    return isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("bitsandbytes.")


def _dequantised(module: Any) -> torch.Tensor:
    """The weight that a quantised module multiplies by ``(D_out, D_in)``."""
    from bitsandbytes import functional

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    # Its first forward takes the scales from the weight.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
