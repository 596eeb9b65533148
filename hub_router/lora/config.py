"""What an adapter's config says about the function that it computes, whichever format it was written in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hub_router.lora.patterns import PatternValue, first_values

PEFT_DEFAULT_ALPHA = 8
PEFT_DEFAULT_INIT_RANK = 12
# What PEFT's AdaLoRA adds to the rank that it divides by.
ADALORA_EPSILON = 1e-5

Kind = Literal["LORA", "ADALORA", "MLX"]


@dataclass(frozen=True)
class AdapterConfig:
    """What the config says about the function of an adapter.

    Args:
        kind (str): ``LORA`` and ``ADALORA`` as PEFT writes them, ``MLX`` for MLX-LM.
        base_model (str | None): ``base_model_name_or_path`` as written.
        base_class (str | None): class of the base model, where ``auto_mapping`` names it.
        r (int | None): rank; None where the config states none and the tensors decide.
        lora_alpha (float): numerator of the scaling.
        use_rslora (bool): scaling alpha/sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732) instead of alpha/r.
        use_dora (bool): every module has a magnitude (DoRA, https://arxiv.org/abs/2402.09353).
        lora_bias (bool): every up projection has a bias.
        bias (str): which biases of the base model were trained: ``none``, ``all`` or ``lora_only``.
        enable_lora (tuple[bool, ...]): parts of a fused map that early PEFT adapted; empty elsewhere.
        init_rank (int): AdaLoRA's rank before pruning, by which it goes on dividing (https://arxiv.org/abs/2303.10512).
        scale (float): MLX-LM's factor on B A.
        rank_pattern (tuple[PatternValue, ...]): ranks of single modules, in file order.
        alpha_pattern (tuple[PatternValue, ...]): alphas of single modules, in file order.
        target_modules (tuple[str, ...] | str): listed targets, a regular expression, or empty.
        exclude_modules (tuple[str, ...] | str): the same for what is left out.
        layers (tuple[int, ...]): ``layers_to_transform``; empty for all.
        modules_to_save (tuple[str, ...]): modules of which PEFT trained a copy.
        notes (tuple[str, ...]): what a user should know, one line each.
    """

    kind: Kind
    base_model: str | None
    base_class: str | None = None
    r: int | None = None
    lora_alpha: float = PEFT_DEFAULT_ALPHA
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    enable_lora: tuple[bool, ...] = ()
    init_rank: int = PEFT_DEFAULT_INIT_RANK
    scale: float = 1.0
    rank_pattern: tuple[PatternValue, ...] = ()
    alpha_pattern: tuple[PatternValue, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Rank of each module as PEFT chooses it: the first matching pattern, else ``r``; absent where none is stated.

        Raises:
            UnsupportedAdapterError: a pattern cannot be matched.
        """
        stated = {module: self.r for module in modules if self.r is not None}
        found = first_values(self.rank_pattern, modules, "rank_pattern")
        return stated | {module: int(value) for module, value in found.items()}

    def scalings(self, stored: Mapping[str, int]) -> dict[str, float]:
        """Factor on B A of each module.

        LoRA: alpha/r, or alpha/sqrt(r) for rsLoRA. AdaLoRA: alpha/(init_r + 1e-5), whatever rank was left. MLX-LM:
        the scale that it states.

        Args:
            stored (Mapping[str, int]): rank of each module's tensors, which stands in where the config states none.

        Returns:
            dict[str, float]: by module.

        Raises:
            UnsupportedAdapterError: a pattern cannot be matched.
        """
        if self.kind == "MLX":
            return dict.fromkeys(stored, self.scale)
        if self.kind == "ADALORA":
            alpha = self.lora_alpha if self.lora_alpha > 0 else float(self.init_rank)
            return dict.fromkeys(stored, alpha / (self.init_rank + ADALORA_EPSILON))
        modules = list(stored)
        ranks = {**stored, **self.ranks(modules)}
        alphas = first_values(self.alpha_pattern, modules, "alpha_pattern")
        return {
            module: alphas.get(module, self.lora_alpha)
            / (math.sqrt(ranks[module]) if self.use_rslora else ranks[module])
            for module in modules
        }

    def function_fields(self) -> str:
        """Canonical JSON of the fields that change the function; of patterns, the first match counts."""
        fields: dict[str, Any] = {
            "lora_alpha": self.lora_alpha,
            "r": self.r,
            "use_rslora": self.use_rslora,
            "rank_pattern": [(entry.text, entry.value) for entry in self.rank_pattern],
            "alpha_pattern": [(entry.text, entry.value) for entry in self.alpha_pattern],
        }
        # Only where they say something: hashes of plain adapters, which catalogs hold, stay what they were.
        if self.kind == "ADALORA":
            fields |= {"kind": self.kind, "init_r": self.init_rank}
        if self.kind == "MLX":
            fields |= {"kind": self.kind, "scale": self.scale}
        others = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "enable_lora": self.enable_lora,
            "modules_to_save": self.modules_to_save,
        }
        fields |= {name: value for name, value in others.items() if value}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))
