"""One module of the base model with its EWoRA adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hub_router.errors import MethodError
from hub_router.ewora.config import EworaConfig

# Half-width of the uniform distribution that W_r is drawn from.
ROUTER_INIT = 1e-2
NO_MERGE = (
    "an EWoRA adapter cannot be merged into the base weights: the weights of its experts depend on the input "
    "(alpha = W_r A x), so its update is no fixed matrix that could be added; keep it loaded, switch it with "
    "set_adapter and disable_adapter, or take it off with unload()"
)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be adapted.

    Args:
        module (nn.Module): a module of the base model.

    Returns:
        str | None: what it is and what can be adapted; None where it can.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is NonDynamicallyQuantizableLinear:
        return f"got {kind}, whose weight its owner uses without calling it, expected a linear map that is called"
    if isinstance(module, nn.Linear | Conv1D | EworaLayer):
        return None
    return f"got {kind}, expected torch.nn.Linear or transformers' Conv1D"


class EworaLayer(nn.Module, BaseTunerLayer):
    """``y = W x + (lora_alpha / r) sum_i alpha_i B_i A_i x`` with ``alpha = W_r A x`` (Section 3 of the paper).

    The experts lie stacked: expert i owns rows ``i r/n .. (i+1) r/n`` of ``A (r, D_in)`` and the same columns of
    ``B (D_out, r)``. Multiplying each part of ``z = A x`` by its ``alpha_i`` before B then sums the experts in one
    product.

    Args:
        base_layer (nn.Module): the module to adapt, for which :func:`refusal` says nothing.
        adapter_name (str): name of its first adapter.
        config (EworaConfig): of that adapter.
    """

    adapter_layer_names = ("ewora_A", "ewora_B", "ewora_R")
    other_param_names = ("r", "n", "scaling", "ewora_dropout")
    # PEFT's, which type checkers do not see behind nn.Module's dynamic attributes.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EworaConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r: dict[str, int] = {}
        self.n: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.ewora_A = nn.ModuleDict()
        self.ewora_B = nn.ModuleDict()
        self.ewora_R = nn.ModuleDict()
        self.ewora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: EworaConfig) -> None:
        """Add an adapter, or replace the one of that name by a fresh one.

        Args:
            adapter_name (str): its name.
            config (EworaConfig): its settings.
        """
        self.r[adapter_name], self.n[adapter_name] = config.r, config.n
        self.scaling[adapter_name] = config.scaling
        self.ewora_A[adapter_name] = nn.Linear(self.in_features, config.r, bias=False)
        self.ewora_B[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        self.ewora_R[adapter_name] = nn.Linear(config.r, config.n, bias=False)
        self.ewora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.reset_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str) -> None:
        """Draw an adapter's parameters anew: the module then is the base module, as B is 0.

        A is Kaiming-uniform, for which the paper states no gain: LoRA's is taken. Its bound depends on D_in alone, so
        that drawing the stacked A is drawing every A_i.

        Args:
            adapter_name (str): name of the adapter.
        """
        nn.init.kaiming_uniform_(self.ewora_A[adapter_name].get_parameter("weight"), a=math.sqrt(5))
        nn.init.zeros_(self.ewora_B[adapter_name].get_parameter("weight"))
        nn.init.uniform_(self.ewora_R[adapter_name].get_parameter("weight"), -ROUTER_INIT, ROUTER_INIT)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base module's output with the updates of the active adapters.

        Args:
            x (torch.Tensor): ``(..., D_in)``.
            *args (Any): further arguments of the base module.
            **kwargs (Any): further arguments of the base module.

        Returns:
            torch.Tensor: ``(..., D_out)``, in the dtype that the base module returns.
        """
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.ewora_A:
                y = y + self.update(name, x).to(y.dtype)
        return y

    def update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What one adapter adds.

        Args:
            adapter_name (str): name of the adapter.
            x (torch.Tensor): ``(..., D_in)``.

        Returns:
            torch.Tensor: ``(..., D_out)``, in the dtype of the adapter, or of the autocast.
        """
        A = cast(nn.Linear, self.ewora_A[adapter_name])
        x = self._cast_input_dtype(x, A.weight.dtype)
        z = A(self.ewora_dropout[adapter_name](x))  # [..., r]
        # The router is called as a module, so that hooks on it see alpha; the scaling is cheapest here.
        gate = self.ewora_R[adapter_name](z) * self.scaling[adapter_name]  # [..., n]
        n = self.n[adapter_name]
        parts = z.unflatten(-1, (n, self.r[adapter_name] // n))  # [..., n, r/n]
        return self.ewora_B[adapter_name]((parts * gate.unsqueeze(-1)).flatten(-2))  # [..., D_out]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Args:
            safe_merge (bool): PEFT's argument.
            adapter_names (list[str] | None): PEFT's argument.

        Raises:
            MethodError: always; says why.
        """
        raise MethodError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing to undo, as nothing can be merged."""

    def __repr__(self) -> str:
        return f"ewora.{super().__repr__()}"
