"""What a config says about an adapter that cannot be used: its type and its base model, for people to find it by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hub_router.sync.discover import CONFIG, CONFIG_BYTES
from hub_router.sync.text import plain

_TYPE = 64
_BASE = 1024


@dataclass(frozen=True)
class Stated:
    """Type and base model as the config writes them; empty and None where it says nothing that can be kept."""

    peft_type: str = ""
    base_model: str | None = None


def read_statement(folder: Path) -> Stated:
    """Read what ``adapter_config.json`` says, whatever else is wrong with it.

    Args:
        folder (Path): the adapter's folder.

    Returns:
        Stated: nothing where there is no config of bounded size that is a JSON object.
    """
    try:
        with (folder / CONFIG).open("rb") as stream:
            fields = json.loads(stream.read(CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return Stated()
    if not isinstance(fields, dict):
        return Stated()
    kind = fields.get("peft_type")
    base = fields.get("base_model_name_or_path", fields.get("model") if "peft_type" not in fields else None)
    return Stated(
        plain(kind)[:_TYPE] if isinstance(kind, str) else "",
        plain(base)[:_BASE] if isinstance(base, str) and base.strip() else None,
    )
