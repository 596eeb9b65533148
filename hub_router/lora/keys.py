"""Tensor names of adapter files: from any spelling to a module path in the base model and the tensor's role there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MAX_NAME = 512

Role = Literal["A", "B", "E", "magnitude", "bias", "embedding_A", "embedding_B"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^(?:module\.)?(?:base_model\.model\.)+")
_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
_FACTOR = re.compile(
    rf"^(?P<module>.+)\.lora_(?P<role>A|B|E|embedding_A|embedding_B|magnitude_vector){_NAME}(?:\.weight)?$"
)
_BIAS = re.compile(rf"^(?P<module>.+)\.lora_B{_NAME}\.bias$")
_MLX = re.compile(r"^(?P<module>.+)\.(?P<role>lora_a|lora_b|m)$")
_MLX_ROLES: dict[str, Role] = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
# Names that MLX-LM's models give to embeddings, whose lora_a has a row per token.
_MLX_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"})
_BASE = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<kind>weight|bias)$")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.)")
_ORIGINAL = re.compile(r"\.original_module\.")

# Heads that a sequence or token classifier saves beside its LoRA factors; a language model has none of them.
HEADS = frozenset({"score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "v_head"})

_FOREIGN = (
    (re.compile(r"\.lora_A(?:\.[^.]+)?\.bias$"), "a bias on lora_A"),
    (re.compile(r"\.lora_diag(?:\.|$)"), "KaSA (lora_diag)"),
    (re.compile(r"\.lora_[ab]$"), "MLX-LM weights (lora_a/lora_b), whose config this is not"),
    (re.compile(r"\.lora\.(?:down|up)\.|\.lora_(?:down|up)\.|^lora_(?:unet|te)"), "diffusers or kohya LoRA weights"),
    (re.compile(r"\.(?:hada|lokr|oft|boft|ia3|vera|randlora)_"), "a PEFT type other than LoRA"),
    (re.compile(r"\.token_adapter\.|\.trainable_tokens_"), "trained token embeddings"),
    (re.compile(r"\.lora_"), "a LoRA variant with further tensors"),
)


@dataclass(frozen=True)
class FactorKey:
    """The place of one tensor of an update.

    Args:
        module (str): module path in the base model.
        role (str): ``A``, ``B``, ``E`` (AdaLoRA), ``magnitude`` (DoRA), ``bias`` (of the up projection), and the
            factors of an embedding.
    """

    module: str
    role: Role


def module_path(name: str) -> str:
    """A tensor name without what PEFT and training wrappers put in front of or into the base model's own path.

    Args:
        name (str): tensor name, e.g. ``base_model.model.score.modules_to_save.default.weight``.

    Returns:
        str: e.g. ``score.weight``.
    """
    return _SAVED.sub("", _PREFIX.sub("", _WRAPPERS.sub("", name)))


def parse_factor(name: str) -> FactorKey | None:
    """The module and role that a PEFT tensor name speaks of.

    ``X.lora_A.weight``, ``X.lora_A.default.weight``, ``X.lora_A.default`` and ``X.lora_A`` are one place, with any
    number of ``base_model.model.`` in front.

    Args:
        name (str): tensor name as stored.

    Returns:
        FactorKey | None: None where the name is not that of a tensor of an update.
    """
    path = module_path(name)
    if match := _FACTOR.match(path):
        role = match["role"]
        return FactorKey(match["module"], "magnitude" if role == "magnitude_vector" else role)  # type: ignore[arg-type]
    match = _BIAS.match(path)
    return FactorKey(match["module"], "bias") if match else None


def parse_mlx_factor(name: str) -> FactorKey | None:
    """The module and role that an MLX-LM tensor name speaks of; its factors are the transposed ones of PEFT.

    Args:
        name (str): tensor name as stored, e.g. ``model.layers.0.self_attn.q_proj.lora_a``.

    Returns:
        FactorKey | None: None where the name is not that of a tensor of an update.
    """
    match = _MLX.match(name)
    if match is None:
        return None
    role = _MLX_ROLES[match["role"]]
    if role in ("A", "B") and match["module"].rsplit(".", 1)[-1] in _MLX_EMBEDDINGS:
        return FactorKey(match["module"], f"embedding_{role}")  # type: ignore[arg-type]
    return FactorKey(match["module"], role)


def parse_base(name: str) -> tuple[str, str] | None:
    """The module whose own weight or bias a tensor repeats, as PEFT saves it for adapted heads and embeddings.

    Args:
        name (str): tensor name as stored, e.g. ``base_model.model.lm_head.base_layer.weight``.

    Returns:
        tuple[str, str] | None: module path and ``weight`` or ``bias``; None where the name is none of these.
    """
    match = _BASE.match(module_path(name))
    return (match["module"], match["kind"]) if match else None


def is_original(name: str) -> bool:
    """Whether a tensor is the base model's own copy of a module of ``modules_to_save``, which no output depends on.

    Args:
        name (str): tensor name as stored.

    Returns:
        bool: so.
    """
    return bool(_ORIGINAL.search(name))


def is_saved_apart(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module of which PEFT trained a copy: listed, marked in its name, or a task head.

    PEFT takes a listed name for every module whose path ends in it, be it in the middle of a word.

    Args:
        name (str): tensor name as stored.
        modules_to_save (Iterable[str]): of the config.

    Returns:
        bool: so.
    """
    if is_wrapped(name) or is_head(name):
        return True
    return any(belongs_to(module_path(name), listed) for listed in modules_to_save)


def belongs_to(path: str, listed: str) -> bool:
    """Whether a parameter lies in a module that an entry of ``modules_to_save`` means.

    Args:
        path (str): parameter path in the base model.
        listed (str): the entry.

    Returns:
        bool: so.
    """
    owner = path.rpartition(".")[0]
    # The end of a module's path is the end of the owner's, or is followed by the name of something inside.
    return owner.endswith(listed) or f"{listed}." in owner


def is_wrapped(name: str) -> bool:
    """Whether a tensor's name says that it is of the copy of a module that PEFT trained.

    Args:
        name (str): tensor name as stored.

    Returns:
        bool: True for ``X.modules_to_save.default.weight``.
    """
    return bool(_SAVED.search(name))


def foreign_reason(names: Iterable[str]) -> str | None:
    """What a file's tensors belong to when a name is that of a known format or variant that this reader does not know.

    Args:
        names (Iterable[str]): tensor names as stored.

    Returns:
        str | None: e.g. ``KaSA (lora_diag)``; None where nothing was recognised.
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
