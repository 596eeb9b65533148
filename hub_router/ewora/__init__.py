"""EWoRA adapters, a type of their own beside LoRA; importing this package registers them with PEFT.

PEFT finds a type by its config and model classes, so the import brings PEFT and torch along.
"""

from __future__ import annotations

from hub_router.ewora.config import EworaConfig
from hub_router.ewora.model import EworaModel
from hub_router.ewora.registration import register

__all__ = ["EworaConfig", "EworaModel", "register"]

register()
