"""Hyperparameters of a method: dataclass fields that carry their rule, so that every wrong value is named at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from hub_router.errors import MethodError

_RULE = "rule"
_HELP = "help"


@dataclass(frozen=True)
class Rule:
    """What a hyperparameter may be.

    Args:
        valid (str): the rule in words, e.g. ``an integer of at least 1``.
        accepts (Callable[[Any], bool]): whether a value obeys it.
    """

    valid: str
    accepts: Callable[[Any], bool]


def integer(default: int, *, at_least: int, help: str) -> Any:
    """A dataclass field that holds an integer.

    Args:
        default (int): the paper's value.
        at_least (int): smallest valid value.
        help (str): one line for users.

    Returns:
        Any: the field.
    """

    def accepts(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= at_least

    return field(default=default, metadata={_RULE: Rule(f"an integer of at least {at_least}", accepts), _HELP: help})


def positive(default: float, *, help: str) -> Any:
    """A dataclass field that holds a finite number above zero.

    Args:
        default (float): the paper's value.
        help (str): one line for users.

    Returns:
        Any: the field.
    """

    def accepts(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf

    return field(default=default, metadata={_RULE: Rule("a finite number above 0", accepts), _HELP: help})


def choice(default: str, *, among: Sequence[str], help: str) -> Any:
    """A dataclass field that holds one of a few names.

    Args:
        default (str): the paper's choice.
        among (Sequence[str]): the valid names.
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    rule = Rule(" or ".join(repr(name) for name in among), lambda value: value in among)
    return field(default=default, metadata={_RULE: rule, _HELP: help})


def text(*, help: str) -> Any:
    """A dataclass field without default that holds a non-empty string.

    Args:
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    rule = Rule("a non-empty string", lambda value: isinstance(value, str) and value != "")
    return field(metadata={_RULE: rule, _HELP: help})


def rule_of(hyperparameter: Any) -> Rule:
    """The rule of a dataclass field made by this file.

    Args:
        hyperparameter (dataclasses.Field): one of ``dataclasses.fields(method)``.

    Returns:
        Rule: what it may be.
    """
    return hyperparameter.metadata[_RULE]


def help_of(hyperparameter: Any) -> str:
    """The line for users of a dataclass field made by this file.

    Args:
        hyperparameter (dataclasses.Field): one of ``dataclasses.fields(method)``.

    Returns:
        str: what it is for.
    """
    return hyperparameter.metadata[_HELP]


def validate(method: Any) -> None:
    """Check all hyperparameters of a method; its dataclass calls this from ``__post_init__``.

    Args:
        method (Any): an instance of a method's dataclass.

    Raises:
        MethodError: names every field that breaks its rule, what it got and what is valid.
    """
    faults = [
        f"{each.name}={getattr(method, each.name)!r}, expected {rule_of(each).valid}"
        for each in fields(method)
        if not rule_of(each).accepts(getattr(method, each.name))
    ]
    if faults:
        raise MethodError(f"method {method.name!r} cannot use {'; '.join(faults)}")
