"""How a saved composition finds its base model again, and how it knows that it is the same one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from hub_router.composition.attach import routed_updates
from hub_router.composition.base_model import base_name, load_model
from hub_router.composition.checkpoint import holds
from hub_router.errors import ArtifactError, MissingError

BUNDLED = "base"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def describe_base(model: Any, folder: Path) -> dict[str, Any]:
    """Say where the base model comes from; save a copy unless that place holds exactly these weights.

    Args:
        model (PreTrainedModel): the base model, routed or not.
        folder (Path): the composition's folder.

    Returns:
        dict: ``reference`` (a folder, a Hub id, or ``base`` for the copy), ``revision``, ``dtype``, ``class``,
        ``fingerprint``.
    """
    reference = str(getattr(model, "name_or_path", "") or "")
    revision = None
    if reference and (Path(reference) / "config.json").is_file():
        place: Path | None = Path(reference).absolute()
        reference = str(place)
    else:
        revision = getattr(model.config, "_commit_hash", None)
        place = _in_cache(reference, revision) if _HUB_ID.fullmatch(reference) else None
    if place is None or _is_bundled(place) or not holds(place, model):
        model.save_pretrained(folder / BUNDLED)
        reference, revision = "", None
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
    widest = reduce(torch.promote_types, (each for each in dtypes.values() if each.is_floating_point), model.dtype)
    return {
        "reference": reference,
        "revision": revision,
        "dtype": _short(widest),
        "dtypes": {name: _short(dtype) for name, dtype in dtypes.items() if dtype != widest},
        "class": type(model).__name__,
        "fingerprint": fingerprint(model),
    }


def restore_base(
    entry: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    folder: Path,
    device: torch.device | str | None,
    moved: str | None = None,
) -> Any:
    """Load the base model that :func:`describe_base` described.

    Args:
        entry (Mapping[str, Any]): what it returned.
        buffers (Mapping[str, torch.Tensor]): :func:`loose_buffers` of the model described.
        folder (Path): the composition's folder.
        device (torch.device | str | None): where to put the model; None leaves it on the CPU.
        moved (str | None): folder or Hub id where the base model is now; None looks where it was.

    Returns:
        PreTrainedModel: in the dtype that it had.

    Raises:
        MissingError: it is not where it was.
        ArtifactError: its weights are not those that the adapters were composed with.
    """
    reference = moved or entry["reference"] or str(folder / BUNDLED)
    revision = entry["revision"] if moved in (None, entry["reference"]) else None
    try:
        model = load_model(reference, device, getattr(torch, entry["dtype"]), revision, entry["class"])
    except MissingError as error:
        raise MissingError(f"{error}; where it moved, pass the base model as load(..., model=...)") from error
    for name, parameter in model.named_parameters():
        if name in entry["dtypes"]:
            parameter.data = parameter.data.to(getattr(torch, entry["dtypes"][name]))
    check_base(entry, model, folder)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(leaf, buffer.to(module.get_buffer(leaf).device), persistent=False)
    return model


def check_base(entry: Mapping[str, Any], model: Any, folder: Path) -> None:
    """Refuse a base model other than the one that was composed with.

    Args:
        entry (Mapping[str, Any]): what :func:`describe_base` returned.
        model (PreTrainedModel): the base model to attach to.
        folder (Path): the composition's folder.

    Raises:
        ArtifactError: its weights differ, if only in dtype.
    """
    got = fingerprint(model)
    if got != entry["fingerprint"]:
        raise ArtifactError(
            f"base model {base_name(model)} in {_short(model.dtype)} has fingerprint {got}, expected "
            f"{entry['fingerprint']} in {entry['dtype']}: its weights were changed since {folder} was saved, or are "
            "another model's; pass the base model that was composed with as load(..., model=...)"
        )


def loose_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point buffers that a checkpoint leaves out, such as rotary frequencies.

    A model that was cast after loading has them cast, too, while a checkpoint of it gives them back in full precision.

    Args:
        model (nn.Module): any model; adapters attached to it do not count.

    Returns:
        dict[str, torch.Tensor]: by name.
    """
    ours = {id(buffer) for _, update in routed_updates(model) for buffer in update.buffers()}
    saved = model.state_dict().keys()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in saved and id(buffer) not in ours and buffer.is_floating_point()
    }


def fingerprint(model: nn.Module) -> str:
    """A hash over the name, dtype, shape and every bit of all that a checkpoint of the model holds; about 1 s per GB.

    Args:
        model (nn.Module): any model; adapters attached to it do not count.

    Returns:
        str: sha256.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_bundled(place: Path) -> bool:
    """Whether a base model lies in another composition, which may be replaced, even by the one being saved."""
    return place.name == BUNDLED and (place.parent / "composition.json").is_file()


def _in_cache(reference: str, revision: str | None) -> Path | None:
    """The folder to which a Hub id was downloaded on this machine."""
    try:
        found = cached_file(reference, "config.json", revision=revision, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent
