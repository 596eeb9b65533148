"""``adapter_config.json`` as PEFT writes it: the fields that decide what an adapter computes, checked one by one."""

from __future__ import annotations

from collections.abc import Callable

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE
from hub_router.lora.config import PEFT_DEFAULT_ALPHA, PEFT_DEFAULT_INIT_RANK, AdapterConfig, Kind
from hub_router.lora.fields import Fields, flag, names, names_or_pattern, number, optional_text, rank, short, wrong
from hub_router.lora.patterns import PatternValue
from hub_router.lora.text import escaped, listing

MAX_PATTERNS = 10_000
# Each is looked for in the name of every saved parameter.
MAX_SAVED = 1_000

# Reason by config field: a true, non-empty value means a function that the tensors of this reader do not express.
_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA, which truncates the base weights",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "a PEFT Arrow router",
    "alora_invocation_tokens": "activated LoRA, which starts at an invocation string",
    "layer_replication": "layer replication, which changes the base model",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
}
# What PEFT up to 0.21 writes, and what it wrote once; anything else may be a variant of tomorrow.
_FIELDS = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "beta1",
        "beta2",
        "bias",
        "corda_config",
        "deltaT",
        "enable_lora",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "init_r",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "monteclora_config",
        "orth_reg_weight",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "target_r",
        "task_type",
        "tfinal",
        "tinit",
        "total_step",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ]
)
# Initialisations that leave the base weights as they are.
_NEUTRAL_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only")


def peft_config(fields: Fields) -> AdapterConfig:
    """The config of a PEFT adapter.

    Args:
        fields (Mapping): its ``adapter_config.json``.

    Returns:
        AdapterConfig: of kind ``LORA`` or ``ADALORA``.

    Raises:
        UnsupportedAdapterError: another type, a variant that the factors do not express, or a field that cannot be
            used.
    """
    peft_type = fields.get("peft_type")
    if peft_type == "LORA" or peft_type == "ADALORA":
        return _peft_config(fields, peft_type)
    raise UnsupportedAdapterError(_foreign_config(fields, peft_type))


def _foreign_config(fields: Fields, peft_type: object) -> str:
    """The reason why a config of another type is refused."""
    if isinstance(peft_type, str) and peft_type:
        shown = peft_type if peft_type.isprintable() and len(peft_type) <= 64 else short(peft_type)
        alone = "; load it alone: import hub_router.ewora, then PeftModel.from_pretrained" if shown == "EWORA" else ""
        return f"unsupported: {shown} (peft_type), only LORA and ADALORA adapters can be composed{alone}"
    if "peft_type" in fields:
        return str(wrong("peft_type", peft_type, "'LORA'"))
    if isinstance(fields.get("config"), dict):
        return "unsupported: AdapterHub adapter (its config holds a nested config and no peft_type)"
    return f"{CONFIG_FILE} has no peft_type, expected 'LORA'"


def _peft_config(fields: Fields, kind: Kind) -> AdapterConfig:
    _refuse_variants(fields)
    notes = []
    if "r" not in fields and kind == "LORA":
        notes.append(f"{CONFIG_FILE} states no r: taken from the tensors")
    if "lora_alpha" not in fields:
        notes.append(f"{CONFIG_FILE} states no lora_alpha: PEFT's default {PEFT_DEFAULT_ALPHA} taken")
    unknown = sorted(escaped(key) for key in fields if key not in _FIELDS and fields[key])
    if unknown:
        notes.append(f"{CONFIG_FILE}: unknown options {listing(unknown)} ignored")
    bias = fields.get("bias", "none")
    if bias is not None and bias not in _BIASES:
        raise wrong("bias", bias, "none, all or lora_only")
    return AdapterConfig(
        kind=kind,
        base_model=optional_text(fields, "base_model_name_or_path"),
        base_class=_base_class(fields),
        # AdaLoRA's r is a budget; what was left of init_r is in the tensors.
        r=rank("r", fields["r"]) if "r" in fields and kind == "LORA" else None,
        lora_alpha=number("lora_alpha", fields.get("lora_alpha", PEFT_DEFAULT_ALPHA)),
        use_rslora=flag(fields, "use_rslora"),
        use_dora=flag(fields, "use_dora"),
        lora_bias=flag(fields, "lora_bias"),
        bias=bias or "none",
        enable_lora=_enabled(fields),
        init_rank=rank("init_r", fields.get("init_r", PEFT_DEFAULT_INIT_RANK)) if kind == "ADALORA" else 1,
        rank_pattern=_patterns(fields, "rank_pattern", rank) if kind == "LORA" else (),
        alpha_pattern=_patterns(fields, "alpha_pattern", number) if kind == "LORA" else (),
        target_modules=names_or_pattern(fields, "target_modules"),
        exclude_modules=names_or_pattern(fields, "exclude_modules"),
        layers=_layers(fields),
        modules_to_save=names(fields, "modules_to_save", MAX_SAVED),
        notes=tuple(notes),
    )


def _refuse_variants(fields: Fields) -> None:
    """Refuse variants of LoRA whose update the factors do not express."""
    for key, meaning in _VARIANTS.items():
        value = flag(fields, key) if key == "use_qalora" else fields.get(key)
        if value:
            raise UnsupportedAdapterError(f"unsupported: {meaning} ({key}={short(value)})")
    if flag(fields, "use_dora") and flag(fields, "lora_bias"):
        raise UnsupportedAdapterError("unsupported: DoRA with lora_bias, for which PEFT has no definition")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _NEUTRAL_INITS):
        return
    raise UnsupportedAdapterError(
        f"unsupported: init_lora_weights={short(init)} starts from changed base weights; convert it with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _patterns(fields: Fields, name: str, checked: Callable[[str, object], float]) -> tuple[PatternValue, ...]:
    """Entries of a pattern field; ``checked`` converts each value."""
    patterns = fields.get(name)
    if patterns is None:
        return ()
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise wrong(name, patterns, f"an object of at most {MAX_PATTERNS} module patterns to numbers")
    return tuple(PatternValue(text, checked(f"{name}[{short(text)}]", value)) for text, value in patterns.items())


def _enabled(fields: Fields) -> tuple[bool, ...]:
    """``enable_lora`` of early PEFT; empty where all of it is off, which made an ordinary LoRA."""
    value = fields.get("enable_lora")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(part, bool) for part in value) or len(value) > 64:
        raise wrong("enable_lora", value, "a list of true and false, or null")
    return tuple(value) if any(value) else ()


def _layers(fields: Fields) -> tuple[int, ...]:
    value = fields.get("layers_to_transform")
    listed = [value] if isinstance(value, int) else value or []
    if not isinstance(listed, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in listed):
        raise wrong("layers_to_transform", value, "a list of layer numbers, one number or null")
    return tuple(dict.fromkeys(listed))


def _base_class(fields: Fields) -> str | None:
    mapping = fields.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 128 else None
