"""What of a base model is on this machine already."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def config_at_hand(reference: str) -> bool:
    """Whether a model's config can be read without asking the Hub.

    Args:
        reference (str): folder or Hub id.

    Returns:
        bool: so.
    """
    try:
        cached = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:
        cached = None
    return isinstance(cached, str) or (Path(reference) / "config.json").is_file()
