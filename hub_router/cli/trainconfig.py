"""``train --config FILE``: a command line in a TOML file, over which what is typed wins."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hub_router.cli.compositions import parse_settings
from hub_router.errors import SettingsError

# Options that name a pool, and those that say where a dataset holds its examples: what is typed replaces all of them.
POOL = ("adapters", "query", "composition", "collection")
COLUMNS = ("column", "output_column", "adapter_column", "dataset_config", "dataset_split")
# Options that make no sense in a file, or that no file should turn on.
_TYPED = {"config", "settings", "restart", "home", "database_url", "as_json", "help"}
_META = "hub_router.train.set"


def read_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Make the entries of a file the command's defaults; an eager option's callback.

    Args:
        ctx (click.Context): of the command.
        path (Path | None): TOML file; None changes nothing.

    Returns:
        Path | None: the same.

    Raises:
        SettingsError: no TOML, or keys or values that the command does not have; names all of them.
    """
    if path is None:
        return None
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"config {path} cannot be read as TOML: {error}") from error
    known = _known(ctx.command)
    faults = [
        f"{key}: {fault}" for key, value in entries.items() if (fault := _fault(known.get(key), key, value)) is not None
    ]
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise SettingsError(f"config {path}:\n{lines}\nits keys are those of the command line: {', '.join(known)}")
    ctx.meta[_META] = entries.pop("set", {})
    ctx.default_map = {known[key].name: value for key, value in entries.items()}
    return path


def merged_settings(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Settings of the file with those that were typed; the callback of ``--set``.

    Args:
        ctx (click.Context): of the command.
        parameter (click.Parameter): the option.
        values (tuple[str, ...]): ``KEY=VALUE`` of the command line.

    Returns:
        dict[str, Any]: by key.
    """
    return {**ctx.meta.get(_META, {}), **parse_settings(ctx, parameter, values)}


def without_replaced(ctx: click.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a file says of a pool or of data where others were typed.

    Args:
        ctx (click.Context): of the command.
        given (Mapping[str, Any]): every option's value.

    Returns:
        dict[str, Any]: the same, those left out as if they had not been given.
    """

    def typed(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    replaced: set[str] = set()
    if typed("more") or any(map(typed, POOL)):
        replaced |= {*POOL}
    if typed("data"):
        replaced |= {*COLUMNS}
    return {
        name: (() if isinstance(value, tuple) else None) if name in replaced and not typed(name) else value
        for name, value in given.items()
    }


def _known(command: click.Command) -> dict[str, click.Parameter]:
    """What a file may say, by key: every name of an option without its dashes, and the method."""
    found: dict[str, click.Parameter] = {}
    for each in command.params:
        if each.name in _TYPED or each.name == "more":
            continue
        names = [name.lstrip("-") for name in each.opts] if isinstance(each, click.Option) else [str(each.name)]
        found |= dict.fromkeys(names, each)
    return found


def _fault(parameter: click.Parameter | None, key: str, value: Any) -> str | None:
    """What is wrong with an entry."""
    if parameter is None:
        return "there is no such option"
    if key == "set":
        odd = not isinstance(value, dict) or [name for name in value if not name.isidentifier()]
        return f"expected a table of settings, got {value!r}" if odd else None
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return None if isinstance(value, bool) else f"expected true or false, got {value!r}"
    if getattr(parameter, "multiple", False):
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return None if good else f"expected a list of texts, got {json.dumps(value, default=str)}"
    expected = int if isinstance(parameter.type, click.types.IntParamType) else str
    if isinstance(value, expected) and not isinstance(value, bool):
        return None
    return f"expected {'a whole number' if expected is int else 'a text'}, got {value!r}"
