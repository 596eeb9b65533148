"""``adapter_config.json``: the fields that decide what a LoRA adapter computes, checked one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.formats import CONFIG_FILE, describe_file, describe_folder
from hub_router.lora.keys import MAX_NAME

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1_000_000
MAX_ALPHA = 1e6
MAX_PATTERNS = 10_000
MAX_REPEATS = 3
MAX_GROUPS = 3
PEFT_DEFAULT_ALPHA = 8

_REPEAT = re.compile(r"(?<![\\(])[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")

# Reason by config field: a true, non-empty value means a function that A, B and a scaling do not express.
_VARIANTS = {
    "use_dora": "DoRA",
    "enable_lora": "MergedLinear",
    "lora_bias": "a bias on lora_B",
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
_KNOWN_USES = {"use_rslora", "use_dora", "use_qalora", "use_bdlora"}
# Initialisations that leave the base weights as they are.
_NEUTRAL_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PatternValue:
    """One entry of ``rank_pattern`` or ``alpha_pattern``.

    Args:
        text (str): the pattern as written.
        regex (re.Pattern[str]): matches the modules that it is meant for.
        value (float): the rank or alpha of those modules.
    """

    text: str
    regex: re.Pattern[str]
    value: float


@dataclass(frozen=True)
class AdapterConfig:
    """What the config says about the function of a LoRA adapter.

    Args:
        base_model (str | None): ``base_model_name_or_path`` as written.
        r (int | None): rank; None where the config states none and the tensors decide.
        lora_alpha (float): numerator of the scaling.
        use_rslora (bool): scaling alpha/sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732) instead of alpha/r.
        rank_pattern (tuple[PatternValue, ...]): ranks of single modules, in file order.
        alpha_pattern (tuple[PatternValue, ...]): alphas of single modules, in file order.
        target_modules (tuple[str, ...]): listed targets; empty where they are a regular expression or absent.
        notes (tuple[str, ...]): what a user should know, one line each.
    """

    base_model: str | None
    r: int | None
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[PatternValue, ...]
    alpha_pattern: tuple[PatternValue, ...]
    target_modules: tuple[str, ...]
    notes: tuple[str, ...]

    def rank(self, module: str) -> int | None:
        """Rank of a module as PEFT chooses it: the first matching pattern, else ``r``."""
        value = _first_match(self.rank_pattern, module)
        return self.r if value is None else int(value)

    def scaling(self, module: str, stored_rank: int) -> float:
        """Factor on B A of a module: alpha/r, or alpha/sqrt(r) for rsLoRA.

        Args:
            module (str): module path in the base model.
            stored_rank (int): rank of the tensors, which stands in where the config states no rank.

        Returns:
            float: the factor.
        """
        value = _first_match(self.alpha_pattern, module)
        alpha = self.lora_alpha if value is None else value
        rank = self.rank(module) or stored_rank
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def function_fields(self) -> str:
        """Canonical JSON of the fields that change the function; of patterns, the first match counts."""
        fields = {
            "lora_alpha": self.lora_alpha,
            "r": self.r,
            "use_rslora": self.use_rslora,
            "rank_pattern": [(entry.text, entry.value) for entry in self.rank_pattern],
            "alpha_pattern": [(entry.text, entry.value) for entry in self.alpha_pattern],
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def read_config(folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        folder (Path): folder of the adapter.

    Returns:
        AdapterConfig: the fields that decide the function.

    Raises:
        UnsupportedAdapterError: no such file, not JSON, not a PEFT LoRA, or a field that cannot be used.
    """
    fields = _read_json(folder)
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise UnsupportedAdapterError(_foreign_config(fields, peft_type))
    _refuse_variants(fields)
    notes = []
    if "r" not in fields:
        notes.append(f"{CONFIG_FILE} states no r: taken from the tensors")
    if "lora_alpha" not in fields:
        notes.append(f"{CONFIG_FILE} states no lora_alpha: PEFT's default {PEFT_DEFAULT_ALPHA} taken")
    unknown = sorted(key for key in fields if key.startswith("use_") and key not in _KNOWN_USES and fields[key])
    if unknown:
        notes.append(f"{CONFIG_FILE}: unknown options {_short(unknown)} ignored")
    return AdapterConfig(
        base_model=_optional_text(fields, "base_model_name_or_path"),
        r=_rank("r", fields["r"]) if "r" in fields else None,
        lora_alpha=_alpha("lora_alpha", fields.get("lora_alpha", PEFT_DEFAULT_ALPHA)),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern=_patterns(fields, "rank_pattern", _rank),
        alpha_pattern=_patterns(fields, "alpha_pattern", _alpha),
        target_modules=_targets(fields),
        notes=tuple(notes),
    )


def _read_json(folder: Path) -> dict[str, Any]:
    """The config as a dictionary."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = describe_folder(folder) if folder.is_dir() else None
        raise UnsupportedAdapterError(f"no {CONFIG_FILE}" + (f", found {found}" if found else f" in {folder.name}"))
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} has {size} bytes, expected at most {MAX_CONFIG_BYTES}")
    what = describe_file(path)
    if what:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} is {what}")
    try:
        fields = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise _wrong(CONFIG_FILE, fields, "a JSON object")
    return fields


def _foreign_config(fields: Mapping[str, Any], peft_type: object) -> str:
    """The reason why a config without ``peft_type: LORA`` is refused."""
    if isinstance(peft_type, str) and peft_type:
        shown = peft_type if peft_type.isprintable() and len(peft_type) <= 64 else _short(peft_type)
        return f"unsupported: {shown} (peft_type), only LORA adapters can be composed"
    if "peft_type" in fields:
        return str(_wrong("peft_type", peft_type, "'LORA'"))
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        return "unsupported: MLX-LM adapter (its config holds lora_parameters and no peft_type)"
    if isinstance(fields.get("config"), dict):
        return "unsupported: AdapterHub adapter (its config holds a nested config and no peft_type)"
    return f"{CONFIG_FILE} has no peft_type, expected 'LORA'"


def _refuse_variants(fields: Mapping[str, Any]) -> None:
    """Refuse LoRA variants whose update is not scaling * B A on the unchanged base model."""
    for key, meaning in _VARIANTS.items():
        value = fields.get(key)
        if key.startswith(("use_", "lora_")) and key != "use_bdlora":
            value = _flag(fields, key)
        if value:
            raise UnsupportedAdapterError(f"unsupported: {meaning} ({key}={_short(value)})")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _NEUTRAL_INITS):
        return
    raise UnsupportedAdapterError(
        f"unsupported: init_lora_weights={_short(init)} starts from changed base weights; convert it with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _first_match(patterns: Sequence[PatternValue], module: str) -> float | None:
    """Value of the first pattern that matches the module; None where none does."""
    return next((entry.value for entry in patterns if entry.regex.match(module)), None)


def _patterns(fields: Mapping[str, Any], name: str, number: Callable[[str, object], float]) -> tuple[PatternValue, ...]:
    """Entries of a pattern field; ``number`` checks and converts each value."""
    patterns = fields.get(name)
    if patterns is None:
        return ()
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise _wrong(name, patterns, f"an object of at most {MAX_PATTERNS} module patterns to numbers")
    return tuple(
        PatternValue(text, _compile(name, text), number(f"{name}[{_short(text)}]", value))
        for text, value in patterns.items()
    )


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    """A pattern that must end the module path and start at its beginning or after a dot, as PEFT's get_pattern_key."""
    # Python's matcher has no time limit: nested or many repeats and groups would hang on a hostile config.
    repeats, groups = len(_REPEAT.findall(pattern)), pattern.count("(")
    if len(pattern) > MAX_NAME or repeats > MAX_REPEATS or groups > MAX_GROUPS or _REPEATED_GROUP.search(pattern):
        raise UnsupportedAdapterError(
            f"{CONFIG_FILE}: {name} pattern {_short(pattern)} is too complex, expected at most {MAX_NAME} characters, "
            f"{MAX_REPEATS} repeats, {MAX_GROUPS} groups and no repeated group"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsupportedAdapterError(
            f"{CONFIG_FILE}: {name} pattern {_short(pattern)} is no regular expression: {error}"
        ) from error


def _targets(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Listed target modules; a string is a regular expression and lists none."""
    targets = fields.get("target_modules")
    if targets is None or isinstance(targets, str):
        return ()
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _wrong("target_modules", targets, "a list of names or one string")
    return tuple(dict.fromkeys(targets))


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return bool(value)


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, value, "a string or null")
    return value


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise _wrong(name, value, f"a whole number from 1 to {MAX_RANK}")
    return value


def _alpha(name: str, value: object) -> float:
    # The bound also keeps out NaN, infinities and integers that no float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise _wrong(name, value, f"a number from {-MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}")
    return float(value)


def _wrong(name: str, value: object, expected: str) -> UnsupportedAdapterError:
    where = name if name == CONFIG_FILE else f"{CONFIG_FILE}: {name}"
    return UnsupportedAdapterError(f"{where} is {_short(value)}, expected {expected}")


def _short(value: object) -> str:
    """A value as JSON, on one line and bounded."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
