"""EWoRA on a whole model: which modules it takes, and what PEFT asks of an adapter type."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from hub_router.errors import IncompatibleAdaptersError, MethodError
from hub_router.ewora.config import EworaConfig
from hub_router.ewora.layer import NO_MERGE, EworaLayer, refusal

PREFIX = "ewora_"


class EworaModel(BaseTuner):
    """A base model with EWoRA adapters; made by ``peft.get_peft_model`` and ``peft.PeftModel.from_pretrained``.

    Args:
        model (nn.Module): base model, changed in place.
        peft_config (EworaConfig | dict[str, EworaConfig]): of the first adapter, or by name.
        adapter_name (str): name of the first adapter.
        low_cpu_mem_usage (bool): make its parameters on the meta device, to be loaded into.
        state_dict (dict[str, torch.Tensor] | None): whose keys say which modules are adapted.

    Raises:
        IncompatibleAdaptersError: ``target_modules`` names modules that cannot be adapted; lists all of them, and the
            model is as it was.
    """

    prefix = PREFIX
    tuner_layer_cls = EworaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: EworaConfig, model: nn.Module) -> None:
        """PEFT's hook before the first module is replaced: refuse what cannot be adapted, all at once."""
        peft_config.check()
        adapted: list[str] = []
        faults = []
        for name, module in model.named_modules():
            if isinstance(module, EworaLayer):
                adapted.append(f"{name}.")
            elif name and not name.startswith(tuple(adapted)) and self._check_target_module_exists(peft_config, name):
                reason = refusal(module)
                if reason:
                    faults.append(f"module {name}: {reason}")
        if faults:
            raise _misfit(model, faults)

    def _create_and_replace(
        self,
        peft_config: EworaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        """PEFT's hook for one module: wrap it, or add to what wraps it."""
        if isinstance(target, EworaLayer):
            target.update_layer(adapter_name, peft_config)
            return
        # A checkpoint's keys, where PEFT goes by them, may name other modules than the config.
        reason = refusal(target)
        if reason:
            raise _misfit(self.model, [f"module {current_key}: {reason}"])
        self._replace_module(parent, target_name, EworaLayer(target, adapter_name, peft_config), target)

    def _check_merge_allowed(self) -> None:
        """PEFT's hook before any merge.

        Raises:
            MethodError: always; says why.
        """
        raise MethodError(NO_MERGE)


def _misfit(model: nn.Module, faults: list[str]) -> IncompatibleAdaptersError:
    return IncompatibleAdaptersError(getattr(model, "name_or_path", "") or type(model).__name__, faults)
