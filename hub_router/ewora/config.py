"""Settings of an EWoRA adapter, as PEFT keeps them in ``adapter_config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from peft import PeftConfig, PeftType

from hub_router.errors import MethodError

TYPE_NAME = "EWORA"
_BIASES = ("none", "all", "ewora_only")


@dataclass
class EworaConfig(PeftConfig):
    """An adapter of ``n`` experts of rank ``r / n`` (`EWoRA <https://aclanthology.org/2025.findings-ijcnlp.108/>`_).

    The fields are named as those of ``peft.LoraConfig``, and what the paper leaves open is as in LoRA.

    Args:
        r (int): rank of all experts together, a multiple of ``n``.
        n (int): experts.
        lora_alpha (float): the update is multiplied by ``lora_alpha / r``.
        lora_dropout (float): share of a module's input that is dropped in training before A.
        target_modules (list[str] | set[str] | str | None): ends of module names, a pattern for whole names,
            ``all-linear``, or None for the modules that PEFT's LoRA takes in this architecture.
        exclude_modules (list[str] | set[str] | str | None): modules left as they are although ``target_modules`` names
            them.
        layers_to_transform (list[int] | int | None): numbers of the layers to adapt; None for all.
        layers_pattern (list[str] | str | None): name of the list that those numbers count, where it is an unusual one.
        bias (str): biases of the base model that are trained, too: ``none``, ``all`` or ``ewora_only``.
        modules_to_save (list[str] | None): modules trained as a whole and saved along.

    Raises:
        MethodError: names every field that cannot be used, what it got and what is valid.
    """

    r: int = field(default=32, metadata={"help": "Rank of all experts together, a multiple of n."})
    n: int = field(default=4, metadata={"help": "Number of experts."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is multiplied by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before A."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Ends of module names, a pattern for whole names, or all-linear."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules left as they are although target_modules names them."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts."}
    )
    bias: str = field(default="none", metadata={"help": "Biases that are trained, too: none, all or ewora_only."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained as a whole and saved along."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(TYPE_NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.check()

    @property
    def scaling(self) -> float:
        """The update's factor, ``lora_alpha / r``."""
        return self.lora_alpha / self.r

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> EworaConfig:
        """PEFT's constructor from a saved config.

        PEFT drops fields that it does not know with a warning. Adapters of another layout bear this type's name, too
        (``num_experts`` of rank ``r`` each, routed by a biased map of ReLU(A x)); they would come out untrained.

        Args:
            **kwargs (Any): what ``adapter_config.json`` holds.

        Returns:
            EworaConfig: the config.

        Raises:
            MethodError: the config does not state ``r`` and ``n``, so it is of another layout; or a field is wrong.
        """
        missing = [name for name in ("r", "n") if name not in kwargs]
        if missing:
            raise MethodError(
                f"the saved config states no {' and no '.join(missing)}, expected r (rank of all experts together) and "
                "n (experts); adapters of other EWoRA implementations compute another function and cannot be loaded"
            )
        return super().from_peft_type(**kwargs)

    def check(self) -> None:
        """Check all fields, which PEFT lets anyone assign.

        Raises:
            MethodError: names every field that cannot be used, what it got and what is valid.
        """
        faults = [*self._size_faults(), *self._target_faults()]
        if faults:
            raise MethodError(f"an EWoRA adapter cannot use {'; '.join(faults)}")

    def _size_faults(self) -> list[str]:
        faults = [
            f"{name}={value!r}, expected an integer of at least 1"
            for name, value in (("r", self.r), ("n", self.n))
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1
        ]
        if not faults and self.r % self.n:
            faults.append(f"r={self.r} with n={self.n}, expected a rank that is a multiple of the number of experts")
        if not 0 < _number(self.lora_alpha) < math.inf:
            faults.append(f"lora_alpha={self.lora_alpha!r}, expected a finite number above 0")
        if not 0 <= _number(self.lora_dropout) < 1:
            faults.append(f"lora_dropout={self.lora_dropout!r}, expected a number from 0, below 1")
        return faults

    def _target_faults(self) -> list[str]:
        faults = []
        if self.bias not in _BIASES:
            faults.append(f"bias={self.bias!r}, expected {', '.join(_BIASES[:-1])} or {_BIASES[-1]}")
        if isinstance(self.target_modules, str):
            # PEFT matches a pattern against whole names and would pass over these without a word.
            faults += [
                f"{name}={value!r} with a pattern as target_modules, expected None, and the layers in the pattern"
                for name, value in (
                    ("layers_to_transform", self.layers_to_transform),
                    ("layers_pattern", self.layers_pattern),
                )
                if value is not None
            ]
        elif self.layers_pattern and self.layers_to_transform is None:
            faults.append(
                f"layers_pattern={self.layers_pattern!r} without layers_to_transform, expected both or neither"
            )
        return faults


def _number(value: object) -> float:
    """A real number as a float; NaN, which breaks every rule, for everything else."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
