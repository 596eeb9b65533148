"""Compares every adapter with the base model before anything is attached, and reports all misfits at once."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoModelForCausalLM

from hub_router.composition.base_model import loading
from hub_router.errors import IncompatibleAdaptersError, MissingError
from hub_router.lora.adapter import LoraAdapter, LoraFactors

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBER = re.compile(r"\d+")
_SHOWN = 3


def empty_model(reference: str) -> nn.Module:
    """The base model's architecture without weights, enough to check adapters against.

    Args:
        reference (str): folder or Hub id of the base model; only its config is read.

    Returns:
        nn.Module: on the meta device.

    Raises:
        MissingError: there is no such model, or its architecture is not one of transformers' causal models.
    """
    with loading(reference):
        config = AutoConfig.from_pretrained(reference, trust_remote_code=False)
        _need_causal(config, (config.architectures or [type(config).__name__])[0], reference)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_fit(model: nn.Module, base: str, adapters: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that do not fit the base model; warn of those that fit, but name another.

    Args:
        model (nn.Module): the base model, or :func:`empty_model` of it.
        base (str): what to call it in the message.
        adapters (Sequence[LoraAdapter]): the pool.

    Raises:
        MissingError: it is an encoder-decoder model.
        IncompatibleAdaptersError: a line per adapter and module that the model lacks, that is no ``nn.Linear``,
            or that has other widths.
    """
    _need_causal(getattr(model, "config", None), type(model).__name__, base)
    modules = dict(model.named_modules())
    nearest = _Nearest(modules)
    mismatches = [
        f"adapter {adapter.name!r}, module {name}: {fault}"
        for adapter in adapters
        for name, factors in adapter.modules.items()
        if (fault := _fault(modules, name, factors, nearest)) is not None
    ]
    if mismatches:
        raise IncompatibleAdaptersError(base, mismatches)
    _warn_of_other_bases(str(getattr(model, "name_or_path", "")), adapters)


def _need_causal(config: Any, kind: str, base: str) -> None:
    """Refuse encoder-decoder models: their linear maps could be routed, but text is read and written causally."""
    if getattr(config, "is_encoder_decoder", False):
        raise MissingError(
            f"base model {base}: {kind} is an encoder-decoder model; this release routes causal language models"
        )


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


def _fault(modules: Mapping[str, nn.Module], name: str, factors: LoraFactors, nearest: _Nearest) -> str | None:
    """What is wrong with one module of one adapter."""
    module = modules.get(name)
    if module is None:
        return f"the model has no such module; the nearest are {nearest(name)}"
    if not isinstance(module, nn.Linear):
        return f"got {type(module).__module__}.{type(module).__qualname__}, expected torch.nn.Linear"
    got, expected = (factors.d_in, factors.d_out), (module.in_features, module.out_features)
    if got != expected:
        return f"got D_in x D_out {got[0]} x {got[1]}, expected {expected[0]} x {expected[1]} as in the model"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it is the output map of a torch.nn.MultiheadAttention, which reads its weight without calling it"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"the model's weight is {module.weight.dtype}, expected a floating-point base model, not a quantised one"
    return None


class _Nearest:
    """Names of linear maps that resemble a missing one.

    Names are compared as patterns with the layer numbers left out, because a deep model repeats a handful of patterns
    and an adapter that does not fit misses all of them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._patterns: dict[str, list[tuple[list[int], str]]] = defaultdict(list)
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                self._patterns[_NUMBER.sub("#", name)].append((_numbers(name), name))
        self._close: dict[str, list[str]] = {}
        self._answers: dict[str, str] = {}

    def __call__(self, missing: str) -> str:
        if missing not in self._answers:
            wanted = _numbers(missing)
            names = [
                min(self._patterns[pattern], key=lambda each: _distance(each[0], wanted))[1]
                for pattern in self._alike(_NUMBER.sub("#", missing))
            ]
            self._answers[missing] = ", ".join(names) or "none"
        return self._answers[missing]

    def _alike(self, pattern: str) -> list[str]:
        if pattern not in self._close:
            self._close[pattern] = get_close_matches(pattern, self._patterns, n=_SHOWN, cutoff=0.4)
        return self._close[pattern]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]


def _distance(numbers: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(numbers, wanted, strict=False))
