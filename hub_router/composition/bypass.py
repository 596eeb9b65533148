"""Modules whose weight a model reads without calling the module, so that what is attached to it would never run.

Mamba's ``dt_proj`` is one: its mixer multiplies by ``self.dt_proj.weight`` itself. The classes' sources say which
children are read that way; a run of the model without weights then shows which of them are called all the same.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

_LOG = logging.getLogger(__name__)
# What these attributes of a weight say is the same with and without an adapter.
_HARMLESS = frozenset({"dtype", "device", "shape", "is_meta", "ndim", "requires_grad"})


def bypassed(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Of some modules, those whose adapters would do nothing: read past, or only there for another's weight.

    Args:
        model (nn.Module): the base model, or one without weights.
        names (Sequence[str]): paths of its modules.

    Returns:
        dict[str, str]: by module, one line that says why.
    """
    read = {name: parent for name in names if is_read_past(parent := _parent(model, name), _leaf(name))}
    never = {name for name, parent in read.items() if _leaf(name) not in _uses_of(parent).called}
    doubtful = [name for name in read if name not in never]
    tied = _tied_embeddings(model, names)
    idle = _idle(model, [*doubtful, *tied]) if doubtful or tied else set()
    never |= idle & set(doubtful)
    found = {
        name: f"{type(parent).__qualname__} reads its weight without calling it, so the adapter would do nothing"
        for name, parent in read.items()
        if name in never
    }
    return found | {
        name: "the model never calls it, only others that share its weight, so the adapter would do nothing"
        for name in tied
        if name in idle
    }


def is_read_past(parent: nn.Module, leaf: str) -> bool:
    """Whether a module's class uses the weight of one of its children as a tensor.

    Args:
        parent (nn.Module): module that holds the child.
        leaf (str): the child's name.

    Returns:
        bool: so; it may call the child all the same.
    """
    return leaf in _uses_of(parent).read


@dataclass(frozen=True)
class _Uses:
    """Children of a class by what its methods do with them: use the weight as a tensor, or call the child."""

    read: frozenset[str]
    called: frozenset[str]


def _uses_of(module: nn.Module) -> _Uses:
    kind: Any = type(module)  # mypy does not believe that a class of modules can be hashed
    return _uses(kind)


@cache
def _uses(kind: Any) -> _Uses:
    """From the source of a class and of those it is made from; methods that only set weights up do not count."""
    read: set[str] = set()
    called: set[str] = set()
    for each in kind.__mro__:
        if each is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and "init" not in method.name:
                read |= _read_in(method)
                called |= {
                    node.func.attr
                    for node in ast.walk(method)
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value)
                }
    return _Uses(frozenset(read), frozenset(called))


def _read_in(method: ast.FunctionDef) -> set[str]:
    """Names X of ``self.X.weight`` in a method, where more than its dtype or type is asked for."""
    harmless: set[int] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
            harmless.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            harmless |= {id(argument) for argument in node.args}
    return {
        node.value.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and id(node) not in harmless
        and isinstance(node.value, ast.Attribute)
        and _is_self(node.value.value)
    }


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _tied_embeddings(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Embeddings that share their weight with another embedding, such as T5's ``shared``."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [
        name
        for name in names
        if isinstance(table := model.get_submodule(name), nn.Embedding)
        and any(other is not table and other.weight is table.weight for other in tables)
    ]


def _idle(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Modules that a forward does not call although it runs what holds them; none where that cannot be found out.

    It is run on a copy without weights. What is overlooked, a guard finds when the model runs
    (:func:`hub_router.composition.attach.attach`).
    """
    called: set[str] = set()
    holders = {name: name.rpartition(".")[0] for name in names}
    try:
        with torch.device("meta"), torch.no_grad():
            empty = type(model)(model.config).eval()
            for name in {*names, *holders.values()}:
                empty.get_submodule(name).register_forward_hook(lambda *_ignored, name=name: called.add(name))
            ids = torch.zeros(1, 2, dtype=torch.int64)
            inputs = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
            empty(input_ids=ids, **inputs)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model's forward raises without weights
        _LOG.debug("%s cannot run without weights: %s", type(model).__name__, error)
        return set()
    return {name for name in names if name not in called and holders[name] in called}
