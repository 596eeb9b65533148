"""Every routing method by name. Adding one takes its file, one line here, its test and its README row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from hub_router.errors import MethodError
from hub_router.routing.arrow import Arrow
from hub_router.routing.base import Router
from hub_router.routing.hilora import Hilora
from hub_router.routing.hilora_gs import HiloraGs
from hub_router.routing.hilora_roc import HiloraRoc
from hub_router.routing.hyperparameters import help_of, invalid, rule_of
from hub_router.routing.knots import Knots
from hub_router.routing.lego import Lego
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.routing.lorahub import Lorahub
from hub_router.routing.maple import Maple
from hub_router.routing.merged import Merged
from hub_router.routing.mixlora import Mixlora
from hub_router.routing.mole import Mole
from hub_router.routing.no_adapter import Base
from hub_router.routing.peft_merge import MERGES
from hub_router.routing.phatgoose import Phatgoose
from hub_router.routing.retriever import Retriever
from hub_router.routing.single import Single
from hub_router.routing.spectr import Spectr
from hub_router.routing.uniform import Uniform
from hub_router.routing.xlora import Xlora

METHODS: Mapping[str, type[Router]] = MappingProxyType(
    {
        method.name: method
        for method in (
            Base,
            Single,
            Uniform,
            Merged,
            Arrow,
            Spectr,
            Retriever,
            Hilora,
            HiloraGs,
            HiloraRoc,
            Lego,
            *MERGES,
            Knots,
            Phatgoose,
            Maple,
            LoraMixer,
            Lorahub,
            Mole,
            Xlora,
            Mixlora,
        )
    }
)


@dataclass(frozen=True)
class HyperparameterInfo:
    """One hyperparameter of a method, for ``hub-router methods``.

    Args:
        name (str): keyword of ``compose``.
        default (Any): the paper's value; None where it must be given.
        required (bool): whether it must be given.
        valid (str): what it may be, in words.
        help (str): what it is for.
    """

    name: str
    default: Any
    required: bool
    valid: str
    help: str


@dataclass(frozen=True)
class MethodInfo:
    """One method, for ``hub-router methods``.

    Args:
        name (str): registry name.
        title (str): one line that says what the gate is.
        paper (str): link to the paper, empty where there is none.
        hyperparameters (tuple[HyperparameterInfo, ...]): in the order of the dataclass.
    """

    name: str
    title: str
    paper: str
    hyperparameters: tuple[HyperparameterInfo, ...]


def describe(name: str) -> MethodInfo:
    """Say what a method is and what it takes.

    Args:
        name (str): registry name.

    Returns:
        MethodInfo: plain values, ready to print.

    Raises:
        MethodError: there is no such method; lists those there are.
    """
    method = _find(name)
    hyperparameters = tuple(
        HyperparameterInfo(
            name=each.name,
            default=None if each.default is MISSING else each.default,
            required=each.default is MISSING,
            valid=rule_of(each).valid,
            help=help_of(each),
        )
        for each in fields(method)  # type: ignore[arg-type]
    )
    return MethodInfo(method.name, method.title, method.paper, hyperparameters)


def describe_all() -> tuple[MethodInfo, ...]:
    """All methods, in the order in which they are shown."""
    return tuple(describe(name) for name in METHODS)


def create(name: str, hyperparameters: Mapping[str, Any]) -> Router:
    """A method with its hyperparameters, checked.

    Args:
        name (str): registry name.
        hyperparameters (Mapping[str, Any]): those that differ from the defaults.

    Returns:
        Router: the method's frozen dataclass.

    Raises:
        MethodError: no such method, a hyperparameter that it does not have or lacks, or an invalid value.
    """
    info = describe(name)
    valid = [each.name for each in info.hyperparameters]
    faults = [
        f"{given}={hyperparameters[given]!r} is none of its hyperparameters"
        + "".join(f", did you mean {close!r}?" for close in get_close_matches(given, valid, n=1))
        for given in hyperparameters
        if given not in valid
    ]
    faults += [
        f"{each.name} is missing, expected {each.valid}"
        for each in info.hyperparameters
        if each.required and each.name not in hyperparameters
    ]
    if faults:
        faults += invalid(_find(name), hyperparameters)
        known = ", ".join(
            each.name if each.required else f"{each.name}={each.default!r}" for each in info.hyperparameters
        )
        raise MethodError(f"method {name!r}: {'; '.join(faults)}; it takes: {known or 'nothing'}")
    return _find(name)(**hyperparameters)


def hyperparameters_of(router: Router) -> dict[str, Any]:
    """The hyperparameters of a method in use.

    Args:
        router (Router): made by :func:`create`.

    Returns:
        dict[str, Any]: values by name, such that ``create(router.name, ...)`` gives an equal method.
    """
    return {each.name: getattr(router, each.name) for each in fields(router)}  # type: ignore[arg-type]


def _find(name: str) -> type[Router]:
    """The class behind a name."""
    if not isinstance(name, str) or name not in METHODS:
        close = get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise MethodError(f"there is no method {name!r}; methods: {', '.join(METHODS)}{hint}")
    return METHODS[name]
