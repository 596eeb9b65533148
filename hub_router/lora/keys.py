"""Tensor names of PEFT files: from any spelling to the module path in the base model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_NAME = 512

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^(?:module\.)?(?:base_model\.model\.)+")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$")
_COPY = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<kind>weight|bias)$")
_SAVED = re.compile(r"\.original_module(?=\.)|\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.)")

# Heads that a sequence or token classifier saves beside its LoRA factors; a language model has none of them.
HEADS = frozenset({"score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "v_head"})

_FOREIGN = (
    (re.compile(r"\.lora_magnitude_vector(?:\.|$)"), "DoRA (lora_magnitude_vector)"),
    (re.compile(r"\.lora_embedding_[AB](?:\.|$)"), "LoRA on an embedding (lora_embedding_A/B)"),
    (re.compile(r"\.lora_[AB](?:\.[^.]+)?\.bias$"), "a bias on a LoRA factor"),
    (re.compile(r"\.lora_E(?:\.|$)"), "AdaLoRA (lora_E)"),
    (re.compile(r"\.lora_diag(?:\.|$)"), "KaSA (lora_diag)"),
    (re.compile(r"\.lora_[ab]$"), "MLX-LM weights (lora_a/lora_b)"),
    (re.compile(r"\.lora\.(?:down|up)\.|\.lora_(?:down|up)\.|^lora_(?:unet|te)"), "diffusers or kohya LoRA weights"),
    (re.compile(r"\.(?:hada|lokr|oft|boft|ia3|vera|randlora)_"), "a PEFT type other than LoRA"),
    (re.compile(r"\.base_layer\.bias$"), "trained biases"),
    (re.compile(r"\.base_layer\.|\.token_adapter\.|\.trainable_tokens_"), "saved or trained token embeddings"),
)


@dataclass(frozen=True)
class FactorKey:
    """The place of one LoRA factor.

    Args:
        module (str): module path in the base model.
        factor (str): ``A`` or ``B``.
    """

    module: str
    factor: str


def module_path(name: str) -> str:
    """A tensor name without what PEFT and training wrappers put in front of or into the base model's own path.

    Args:
        name (str): tensor name, e.g. ``base_model.model.score.modules_to_save.default.weight``.

    Returns:
        str: e.g. ``score.weight``.
    """
    return _SAVED.sub("", _PREFIX.sub("", _WRAPPERS.sub("", name)))


def parse_factor(name: str) -> FactorKey | None:
    """The module and factor that a tensor name speaks of.

    ``X.lora_A.weight``, ``X.lora_A.default.weight``, ``X.lora_A.default`` and ``X.lora_A`` are one place, with any
    number of ``base_model.model.`` in front.

    Args:
        name (str): tensor name as stored.

    Returns:
        FactorKey | None: None where the name is not that of a linear LoRA factor.
    """
    match = _FACTOR.match(module_path(name))
    return FactorKey(match["module"], match["factor"]) if match else None


def parse_copy(name: str) -> tuple[str, str] | None:
    """The module whose frozen weight or bias a tensor repeats, as PEFT saves it for an adapted output head.

    Args:
        name (str): tensor name as stored, e.g. ``base_model.model.lm_head.base_layer.weight``.

    Returns:
        tuple[str, str] | None: module path and ``weight`` or ``bias``; None where the name is none of these.
    """
    match = _COPY.match(module_path(name))
    return (match["module"], match["kind"]) if match else None


def foreign_reason(names: Iterable[str]) -> str | None:
    """What a file's tensors belong to when a name is that of a known format or variant other than linear LoRA.

    Args:
        names (Iterable[str]): tensor names as stored.

    Returns:
        str | None: e.g. ``DoRA (lora_magnitude_vector)``; None where nothing was recognised.
    """
    listed = list(names)
    return next((reason for pattern, reason in _FOREIGN if any(map(pattern.search, listed))), None)


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a task head such as ``score``, which no language model has.

    Args:
        name (str): tensor name as stored.

    Returns:
        bool: True for a head.
    """
    return not HEADS.isdisjoint(module_path(name).split("."))


def is_printable(name: str) -> bool:
    """Whether a tensor name is short enough and free of control characters.

    Args:
        name (str): tensor name as stored.

    Returns:
        bool: True for a name that can be shown and stored.
    """
    return len(name) <= MAX_NAME and name.isprintable() and bool(name.strip())
