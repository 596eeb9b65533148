"""Hyperparameters of a method: dataclass fields that carry their rule, so that every wrong value is named at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
        plain (Callable[[Any], Any]): makes of a value that obeys, such as NumPy's, the built-in one that JSON can hold.
    """

    valid: str
    accepts: Callable[[Any], bool]
    plain: Callable[[Any], Any]


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

    rule = Rule(f"an integer of at least {at_least}", accepts, int)
    return field(default=default, metadata={_RULE: rule, _HELP: help})


def positive(default: float, *, help: str) -> Any:
    """A dataclass field that holds a finite number above zero.

    Args:
        default (float): the paper's value.
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    rule = Rule("a finite number above 0", lambda value: 0 < _number(value) < math.inf, float)
    return field(default=default, metadata={_RULE: rule, _HELP: help})


def fraction(default: float, *, help: str) -> Any:
    """A dataclass field that holds a share of a whole: above 0, at most 1.

    Args:
        default (float): the paper's value.
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    rule = Rule("a number above 0, at most 1", lambda value: 0 < _number(value) <= 1, float)
    return field(default=default, metadata={_RULE: rule, _HELP: help})


def optional_integer(*, at_least: int, help: str) -> Any:
    """A dataclass field that holds an integer, or None, its default.

    Args:
        at_least (int): smallest valid value.
        help (str): one line for users, which says what None means.

    Returns:
        Any: the field.
    """
    given = rule_of(integer(at_least, at_least=at_least, help=help))
    rule = Rule(
        f"{given.valid}, or None",
        lambda value: value is None or given.accepts(value),
        lambda value: None if value is None else given.plain(value),
    )
    return field(default=None, metadata={_RULE: rule, _HELP: help})


def choice(default: str, *, among: Sequence[str], help: str) -> Any:
    """A dataclass field that holds one of a few names.

    Args:
        default (str): the paper's choice.
        among (Sequence[str]): the valid names.
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    valid = " or ".join(repr(name) for name in among)
    rule = Rule(valid, lambda value: isinstance(value, str) and value in among, str)
    return field(default=default, metadata={_RULE: rule, _HELP: help})


def text(*, help: str) -> Any:
    """A dataclass field without default that holds a non-empty string.

    Args:
        help (str): one line for users.

    Returns:
        Any: the field.
    """
    rule = Rule("a non-empty string", lambda value: isinstance(value, str) and value != "", str)
    return field(metadata={_RULE: rule, _HELP: help})


def set_name() -> Any:
    """A dataclass field that names the prototype set with a method's trained vectors; by default none.

    Returns:
        Any: the field.
    """
    rule = Rule("the name of a prototype set", lambda value: isinstance(value, str), str)
    note = "prototype set of the catalog, as NAME or NAME@VERSION, or a file that was exported"
    return field(default="", metadata={_RULE: rule, _HELP: note})


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


def invalid(method: Any, values: Mapping[str, Any]) -> list[str]:
    """Which values break the rules of a method's hyperparameters.

    Args:
        method (Any): a method's dataclass, or an instance of it.
        values (Mapping[str, Any]): by hyperparameter; names that the method does not have are passed over.

    Returns:
        list[str]: for each, what it got and what is valid.
    """
    return [
        f"{each.name}={values[each.name]!r}, expected {rule_of(each).valid}"
        for each in fields(method)
        if each.name in values and not rule_of(each).accepts(values[each.name])
    ]


def validate(method: Any) -> None:
    """Check all hyperparameters of a method and make them built-in values; its ``__post_init__`` calls this.

    Args:
        method (Any): an instance of a method's dataclass.

    Raises:
        MethodError: names every field that breaks its rule, what it got and what is valid.
    """
    given = {each.name: getattr(method, each.name) for each in fields(method)}
    if faults := invalid(method, given):
        raise MethodError(f"method {method.name!r} cannot use {'; '.join(faults)}")
    for each in fields(method):
        # The method's dataclass is frozen, also for its own __post_init__.
        object.__setattr__(method, each.name, rule_of(each).plain(given[each.name]))


def _number(value: Any) -> float:
    """A real number as a float; NaN, which breaks every rule, for everything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
