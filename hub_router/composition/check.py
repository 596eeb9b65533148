"""Compares every adapter with the base model before anything is attached, and reports all misfits at once."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from torch import nn

from hub_router.composition.fit import BaseModules
from hub_router.errors import IncompatibleAdaptersError
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.facts import module_facts

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_fit(model: nn.Module, base: str, adapters: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that do not fit the base model; warn of those that fit, but name another.

    Args:
        model (nn.Module): the base model, or one without weights.
        base (str): what to call it in the message.
        adapters (Sequence[LoraAdapter]): the pool.

    Raises:
        IncompatibleAdaptersError: a line per adapter and module that the model lacks, that is no linear map, that has
            other widths, or that the model does not call.
    """
    base_modules = BaseModules(model)
    mismatches = [
        f"adapter {adapter.name!r}, module {fit.module}: {fit.reason}"
        for adapter in adapters
        for fit in base_modules.fit(module_facts(adapter))
        if not fit.fits
    ]
    if mismatches:
        raise IncompatibleAdaptersError(base, mismatches)
    _warn_of_other_bases(str(getattr(model, "name_or_path", "")), adapters)


def _warn_of_other_bases(name: str, adapters: Sequence[LoraAdapter]) -> None:
    """Log the adapters trained for another base model, where both are named by Hub ids; folders tell nothing."""
    if not _HUB_ID.fullmatch(name):
        return
    others = [
        f"{adapter.name!r} ({adapter.base_model})"
        for adapter in adapters
        if adapter.base_model and _HUB_ID.fullmatch(adapter.base_model) and adapter.base_model.lower() != name.lower()
    ]
    if others:
        _LOG.warning("the base model is %s, but adapters name another: %s", name, ", ".join(others))
