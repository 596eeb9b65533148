"""Which PEFT types other than LoRA can be turned into LoRA, told from a folder's config alone, without torch.

PEFT converts the types whose update is a matrix that is added to the weight. What it needs beside the adapter's own
tensors differs from type to type, and decides whether the conversion can be done without the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_router.errors import SettingsError, UnsupportedAdapterError
from hub_router.lora.config_file import read_fields
from hub_router.lora.fields import short


@dataclass(frozen=True)
class Convertible:
    """A PEFT type that this package converts with PEFT's own conversion.

    Args:
        prefix (str): what the names of its tensors start with, after the module's path.
        needs_shapes (bool): the tensors do not tell the modules' widths, so the base model's architecture is needed.
    """

    prefix: str
    needs_shapes: bool = False


CONVERTIBLE: Mapping[str, Convertible] = {
    "LOHA": Convertible("hada_"),
    "LOKR": Convertible("lokr_"),
    "C3A": Convertible("c3a_"),
    "DELORA": Convertible("delora_"),
    "GRALORA": Convertible("gralora_"),
    "VBLORA": Convertible("vblora_"),
    "FOURIERFT": Convertible("fourierft_", needs_shapes=True),
    "MISS": Convertible("miss_", needs_shapes=True),
    "RANDLORA": Convertible("randlora_", needs_shapes=True),
    "VERA": Convertible("vera_", needs_shapes=True),
    "WAVEFT": Convertible("waveft_", needs_shapes=True),
}
# Types that PEFT converts, but not from an adapter's folder.
BEYOND: Mapping[str, str] = {
    "EWORA": "its experts' weights depend on the input, so no LoRA equals it",
    "MISS (bat)": "PEFT's conversion to LoRA needs the weights of the base model",
    "PSOFT": "PEFT's conversion to LoRA needs the weights of the base model",
    "TINYLORA": "PEFT's conversion to LoRA needs the weights of the base model, and the order of its modules",
    "UNILORA": "PEFT's conversion to LoRA needs the base model, over whose modules it draws the factors",
}
# Read as they are, so that there is nothing to convert.
COMPOSED = ("LORA", "ADALORA")


def check_rank(rank: object) -> int | float:
    """A rank that can be asked for.

    Args:
        rank (object): a whole number from 1, or the share of the energy to keep, between 0 and 1.

    Returns:
        int | float: the same.

    Raises:
        SettingsError: it is neither.
    """
    if not isinstance(rank, bool):
        if isinstance(rank, int) and rank >= 1:
            return rank
        if isinstance(rank, float) and 0 < rank < 1:
            return rank
    raise SettingsError(
        f"convert rank is {rank!r}, expected a whole number from 1, or the share of the energy (the squared singular "
        "values) to keep, between 0 and 1: e.g. 16, or 0.99"
    )


def config_fields(folder: Path) -> Mapping[str, Any] | None:
    """The ``adapter_config.json`` of a folder.

    Args:
        folder (Path): any folder.

    Returns:
        Mapping[str, Any] | None: None where there is none that can be read, which :func:`read_config` explains.
    """
    try:
        return read_fields(folder)
    except (UnsupportedAdapterError, OSError):
        return None


def foreign_type(folder: Path) -> str | None:
    """The PEFT type of an adapter that is not composed as it is.

    Args:
        folder (Path): folder of the adapter.

    Returns:
        str | None: e.g. ``LOHA``; None for LoRA, and where the config states none.
    """
    stated = (config_fields(folder) or {}).get("peft_type")
    return stated if isinstance(stated, str) and stated and stated not in COMPOSED else None


def convertible(fields: Mapping[str, Any]) -> Convertible:
    """How an adapter of another type is converted.

    Args:
        fields (Mapping[str, Any]): its ``adapter_config.json``.

    Returns:
        Convertible: what its tensors are called, and what else is needed.

    Raises:
        UnsupportedAdapterError: PEFT has no conversion for its type, or one that needs more than the adapter.
    """
    peft_type = str(fields.get("peft_type"))
    found = CONVERTIBLE.get(peft_type)
    if peft_type == "MISS" and fields.get("init_weights") == "bat":
        found, peft_type = None, "MISS (bat)"
    if found is None:
        shown = peft_type if peft_type.isprintable() and len(peft_type) <= 64 else short(peft_type)
        reason = BEYOND.get(peft_type, "PEFT has no conversion to LoRA for it")
        raise UnsupportedAdapterError(f"unsupported: {shown}, {reason}")
    return found
