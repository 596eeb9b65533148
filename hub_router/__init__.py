"""hub_router: find LoRA adapters on the Hugging Face Hub and run one model that routes over them.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_router.composition.build import compose
    from hub_router.composition.routed import RoutedModel
    from hub_router.hub import Hub

__all__ = ["Hub", "RoutedModel", "compose"]
__version__ = "0.1.0"

_HOMES = {
    "Hub": "hub_router.hub",
    "RoutedModel": "hub_router.composition.routed",
    "compose": "hub_router.composition.build",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hub_router' has no attribute {name!r}; public names: {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
