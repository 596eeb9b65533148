"""``adapter_config.json`` as `MLX-LM <https://github.com/ml-explore/mlx-lm>`_ writes it.

MLX-LM computes ``y = W x + scale * (x lora_a) lora_b`` with ``lora_a [D_in, r]`` and ``lora_b [r, D_out]``, and DoRA
with row lengths ``m``; module names are those of the transformers implementation.
"""

from __future__ import annotations

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE
from hub_router.lora.config import AdapterConfig
from hub_router.lora.fields import Fields, flag, number, optional_text, rank, wrong


def is_mlx(fields: Fields) -> bool:
    """Whether a config is MLX-LM's: it has no ``peft_type``, and says how and where to train.

    Args:
        fields (Mapping): the config.

    Returns:
        bool: so.
    """
    return "peft_type" not in fields and ("lora_parameters" in fields or "fine_tune_type" in fields)


def mlx_config(fields: Fields) -> AdapterConfig:
    """The config of an MLX-LM adapter.

    Args:
        fields (Mapping): its ``adapter_config.json``.

    Returns:
        AdapterConfig: of kind ``MLX``.

    Raises:
        UnsupportedAdapterError: full fine-tuning, or a field that is missing or cannot be used.
    """
    style = fields.get("fine_tune_type", "lora")
    if not isinstance(style, str):
        raise wrong("fine_tune_type", style, "'lora' or 'dora'")
    if style not in ("lora", "dora"):
        raise UnsupportedAdapterError(f"unsupported: MLX-LM fine_tune_type={style!r}"[:200] + ", expected lora or dora")
    stated = fields.get("lora_parameters")
    if not isinstance(stated, dict) or "scale" not in stated:
        raise wrong("lora_parameters", stated, "an object with a scale (MLX-LM)")
    scale, notes = number("lora_parameters.scale", stated["scale"]), []
    states_rank = "rank" in stated
    if "alpha" in stated:
        # MLX-LM multiplied by alpha/rank until June 2024, and left alpha in its configs after that. The fields below
        # came in May 2024 and later; without them a config is of the first kind.
        if {"use_dora", "fine_tune_type", "num_layers"}.isdisjoint(fields) and states_rank:
            alpha, r = number("lora_parameters.alpha", stated["alpha"]), rank("lora_parameters.rank", stated["rank"])
            scale *= alpha / r
            notes.append(f"{CONFIG_FILE} is of an MLX-LM that multiplied scale by alpha/rank: factor {scale:g}")
        else:
            notes.append(f"{CONFIG_FILE} states alpha, which MLX-LM ignores: factor {scale:g} is its scale")
    return AdapterConfig(
        kind="MLX",
        base_model=optional_text(fields, "model"),
        r=rank("lora_parameters.rank", stated["rank"]) if states_rank else None,
        use_dora=style == "dora" or flag(fields, "use_dora"),
        scale=scale,
        notes=tuple(notes),
    )
