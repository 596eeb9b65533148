"""``conversion.json``: what a converted adapter was made from, and how far it is from that, module by module.

This package writes the file beside the adapters that it converts. A stranger may ship one too, which is why nothing
that reads an adapter looks at it: only the catalog does, for the folders in its own home.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hub_router.lora.fields import MAX_RANK
from hub_router.lora.keys import is_printable

RECORD_FILE = "conversion.json"
MAX_RECORD_BYTES = 32_000_000

_TEXTS = {
    "source": re.compile(r".{1,4096}"),
    "source_hash": re.compile(r"[0-9a-f]{64}"),
    "peft_type": re.compile(r"[A-Z0-9_]{1,64}"),
    "peft_version": re.compile(r"[0-9][0-9A-Za-z.+-]{0,63}"),
}


@dataclass(frozen=True)
class ConvertedModule:
    """One converted module.

    Args:
        rank (int): rank of its LoRA factors.
        error (float): ``||dW - B A||_F / ||dW||_F``, in double precision; 0 where dW is zero.
    """

    rank: int
    error: float


@dataclass(frozen=True)
class ConversionRecord:
    """How a LoRA adapter was made from one of another type.

    Args:
        source (str): reference of the adapter that was converted.
        source_hash (str): sha256 over its weight files and config.
        peft_type (str): its type, e.g. ``LOHA``.
        peft_version (str): version of PEFT that converted it.
        rank (int | float): what was asked for: a rank, or the share of the squared singular values to keep.
        modules (Mapping[str, ConvertedModule]): by module path.
    """

    source: str
    source_hash: str
    peft_type: str
    peft_version: str
    rank: int | float
    modules: Mapping[str, ConvertedModule]

    @property
    def worst(self) -> str:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: self.modules[module].error)

    @property
    def median(self) -> float:
        """Median error of the modules."""
        return statistics.median(module.error for module in self.modules.values())

    @property
    def note(self) -> str:
        """The record in one line, for the catalog."""
        ranks = sorted({module.rank for module in self.modules.values()})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        kept = f" ({self.rank:g} of the energy)" if isinstance(self.rank, float) else ""
        error = f"at most {self.modules[self.worst].error:.2g} ({self.worst}), median {self.median:.2g}"
        made = f"{converted_from(self.source)}{self.peft_type}) by PEFT {self.peft_version} at {shown}{kept}"
        return f"{made}: relative error {error}"

    def write(self, folder: Path) -> None:
        """Write the file.

        Args:
            folder (Path): folder of the converted adapter.
        """
        document = {**asdict(self), "worst": self.modules[self.worst].error, "median": self.median}
        (folder / RECORD_FILE).write_text(json.dumps(document, indent=1) + "\n")


def converted_from(source: str) -> str:
    """What the note about a conversion of this adapter starts with."""
    return f"converted from {source} ("


def read_record(folder: Path) -> ConversionRecord | None:
    """Read the file.

    Args:
        folder (Path): folder of an adapter.

    Returns:
        ConversionRecord | None: None where there is none, or one that :meth:`ConversionRecord.write` did not write.
    """
    path = folder / RECORD_FILE
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        return _parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def _parse(document: Any) -> ConversionRecord | None:
    """The record, if every field is of the right type and range."""
    if not isinstance(document, dict) or not isinstance(document.get("modules"), dict):
        return None
    source, digest, kind, version = (_text(document, name, pattern) for name, pattern in _TEXTS.items())
    rank = document.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not 0 < rank <= MAX_RANK:
        return None
    modules = {name: _module(name, entry) for name, entry in document["modules"].items()}
    known = {name: module for name, module in modules.items() if module is not None}
    if not known or len(known) != len(modules) or not (source and digest and kind and version):
        return None
    return ConversionRecord(source, digest, kind, version, rank, known)


def _text(document: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    """A printable text of the right form, else an empty one."""
    value = document.get(name)
    return value if isinstance(value, str) and pattern.fullmatch(value) and value.isprintable() else ""


def _module(name: str, entry: Any) -> ConvertedModule | None:
    rank, error = (entry.get("rank"), entry.get("error")) if isinstance(entry, dict) else (None, None)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK or not is_printable(name):
        return None
    if isinstance(error, bool) or not isinstance(error, int | float) or not math.isfinite(error) or error < 0:
        return None
    return ConvertedModule(rank, float(error))
