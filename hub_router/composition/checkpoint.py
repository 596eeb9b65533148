"""Compares a live model with the checkpoint that it is said to come from: exactly, and without a second model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What loading sets, or what says nothing about the outputs.
_INCIDENTAL = frozenset(
    {"_name_or_path", "_commit_hash", "architectures", "dtype", "transformers_version", "use_cache"}
)


def holds(folder: Path, model: Any) -> bool:
    """Whether loading a folder in a model's dtype gives that model's configuration and weights, to the bit.

    Args:
        folder (Path): a checkpoint's folder, or a snapshot in the Hub's cache.
        model (PreTrainedModel): the live model; what is attached to it does not count.

    Returns:
        bool: False on any doubt, too: no safetensors, or tensors under names that the model does not use.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return _facts(config) == _facts(model.config) and _same_weights(folder, model)
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on the CPU agree in dtype, shape and every bit, also in NaN and the sign of zero.

    Args:
        one (torch.Tensor): any shape.
        other (torch.Tensor): any shape.

    Returns:
        bool: so.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _facts(config: Any) -> dict[str, Any]:
    return _without_incidental(config.to_dict())


def _without_incidental(value: Any) -> Any:
    """A configuration, with those nested in it, as JSON would hold it."""
    if isinstance(value, dict):
        return {str(key): _without_incidental(each) for key, each in value.items() if key not in _INCIDENTAL}
    return [_without_incidental(each) for each in value] if isinstance(value, list | tuple) else value


def _same_weights(folder: Path, model: Any) -> bool:
    """Compare tensor by tensor, each read from the mapped file; tied tensors are stored under one of their names."""
    live = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    found: set[tuple[Any, ...]] = set()
    for name, stored in _stored(folder):
        key = name if name in live else prefix + name
        if key not in live:
            continue
        if not same_bits(live[key].detach().cpu(), stored.to(live[key].dtype)):
            return False
        found.add(_memory(live[key]))
    return all(_memory(tensor) in found for tensor in live.values())


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, one at a time; the single file goes before shards, as it does in transformers."""
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors."""
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
