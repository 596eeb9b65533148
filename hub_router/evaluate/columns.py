"""The columns of a comparison, as a user names them: a method, one with settings of its own, or all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hub_router.errors import MethodError
from hub_router.routing.registry import HyperparameterInfo, create, describe_all

# The column in which every task runs on its own adapter: the oracle of the papers.
OWN = "own"
ALL = "all"


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        title (str): as the user wrote it, such as ``hilora:epsilon=0.0002``.
        method (str): registry name, or ``own``.
        hyperparameters (Mapping[str, Any]): those that differ from the defaults.
        asked (bool): whether it was named; one that came with ``all`` may be left out where the pool does not allow it.
    """

    title: str
    method: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    asked: bool = True


def read_columns(names: Sequence[str], kept: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
    """Columns from their names, each once.

    Args:
        names (Sequence[str]): ``METHOD``, ``METHOD:KEY=VALUE[:KEY=VALUE...]``, ``own`` or ``all``.
        kept (Mapping[str, Mapping[str, Any]]): hyperparameters of methods that are named alone; others take defaults.

    Returns:
        tuple[Column, ...]: in the order of the names.

    Raises:
        MethodError: a name is malformed, or the method or a setting is unknown or invalid.
    """
    columns: dict[str, Column] = {}
    for name in names:
        for column in _all(kept) if name == ALL else [_read(name, kept)]:
            if column.title not in columns or column.asked:
                columns[column.title] = column
    for column in columns.values():
        if column.method != OWN:
            create(column.method, column.hyperparameters)
    return tuple(columns.values())


def _all(kept: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """Every method that runs without being told more, such as a prototype set, and the oracle after the base model."""
    names = [
        method.name
        for method in describe_all()
        if method.name in kept or not any(_is_needed(each) for each in method.hyperparameters)
    ]
    return [Column(name, name, kept.get(name, {}), asked=False) for name in (*names[:1], OWN, *names[1:])]


def _is_needed(hyperparameter: HyperparameterInfo) -> bool:
    """Whether a method runs only where it is told this."""
    return hyperparameter.required or hyperparameter.name == "prototypes"


def _read(name: str, kept: Mapping[str, Mapping[str, Any]]) -> Column:
    """A column from its name; a value is JSON where it can be read as such, else a string."""
    method, *pairs = name.split(":")
    if not pairs:
        return Column(name, method, kept.get(method, {}))
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if method == OWN or not equals or not key.isidentifier() or key in settings:
            raise MethodError(
                f"{name!r} is no column, expected METHOD, METHOD:KEY=VALUE with each key once, such as "
                f"arrow:top_k=1:temperature=0.5, {OWN!r} or {ALL!r}"
            )
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return Column(name, method, settings)
