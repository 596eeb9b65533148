"""What a cache remembers of the text that it holds: the plan, row by row, for whoever continues it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hub_router.errors import RoutedStateError

# Where a model takes its cache, and gives it back; and where a cache keeps its mark.
_KEYS = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_MARK = "hub_router_plan"

Rows = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Mark:
    """Whose plan it is, its rows, and by what the cache's rows are told apart: their length and last keys."""

    planner: str
    rows: Rows
    length: int
    keys: torch.Tensor | None


def caches_in(named: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among a model's inputs or outputs.

    Args:
        named (Mapping[str, Any]): by their names in the model's forward.

    Returns:
        dict[str, Any]: by the same names, of any kind.
    """
    return {key: cache for key in _KEYS if (cache := named.get(key)) is not None}


def holds_tokens(cache: Any) -> bool:
    """Whether a cache holds earlier tokens; one of transformers is a list of layers, each with a state of its own.

    Args:
        cache (Any): of any kind.

    Returns:
        bool: True for a model's own kind, of whose making there is nothing to be known: tuples of tensors, mostly.
    """
    layers = _layers(cache)
    if layers is None:
        return True
    for layer in layers:
        if any(getattr(layer, "has_previous_state", {}).values()):
            return True
        length = getattr(layer, "get_seq_length", None)
        if length is not None and int(length()) > 0:
            return True
    return False


def mark(cache: Any, planner: str, rows: Rows) -> None:
    """Let a cache remember the plan of what it holds; one that cannot carry a mark stays as it is.

    Args:
        cache (Any): filled by the forward that just ended.
        planner (str): identity of who planned.
        rows (Mapping[str, torch.Tensor]): of the plan, ``(B, ...)``.
    """
    if hasattr(cache, "get_seq_length") or hasattr(cache, "seqlen_offset"):
        length, keys = _last_keys(cache)
        setattr(cache, _MARK, _Mark(planner, rows, length, None if keys is None else keys.clone()))


def recall(cache: Any, planner: str) -> Rows | None:
    """The plan of what a cache holds, in the order that its rows have now.

    Args:
        cache (Any): to be continued.
        planner (str): identity of who would plan.

    Returns:
        Mapping[str, torch.Tensor] | None: rows ``(B, ...)``; None where this planner never saw the text. A cache that
            was cropped, or is of a model's own kind, is taken to hold its rows in the order in which they were planned.

    Raises:
        RoutedStateError: its rows are not those that were planned.
    """
    found = getattr(cache, _MARK, None)
    if found is None or found.planner != planner:
        return None
    length, keys = _last_keys(cache)
    if keys is None or found.keys is None or length != found.length:
        return found.rows
    if keys.shape == found.keys.shape and torch.equal(keys, found.keys):
        return found.rows
    # Reordered, repeated or selected, as beam search by hand does it. Rows that are alike hold one text, and one plan.
    alike = (keys.unsqueeze(1) == found.keys.unsqueeze(0)).all(-1)  # [B now, B then]
    if not bool(alike.any(-1).all()):
        raise RoutedStateError(
            "the cache of this forward holds other sequences than when they were planned; continue the cache that the "
            "model gave back, reordered or with rows left out if need be, or start with the prompts' input_ids"
        )
    order = alike.int().argmax(-1)
    return {name: row.index_select(0, order.to(row.device)) for name, row in found.rows.items()}


def length_of(cache: Any) -> int:
    """Tokens that a cache holds.

    Args:
        cache (Any): of transformers' kinds.

    Returns:
        int: of the layers with keys; 0 where there are none.
    """
    return _last_keys(cache)[0]


def _layers(cache: Any) -> Any:
    return getattr(getattr(cache, "self_attention_cache", cache), "layers", None)


def _last_keys(cache: Any) -> tuple[int, torch.Tensor | None]:
    """Tokens held, and the keys of the newest in the last layer that has keys, ``(B, H D)``; these depend on all."""
    for layer in reversed(_layers(cache) or ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[-2]:
            length = int(layer.get_seq_length())
            return length, keys[:, :, min(length, keys.shape[-2]) - 1].flatten(1)
    return 0, None
