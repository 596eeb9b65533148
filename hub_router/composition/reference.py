"""How a saved composition finds its base model again, and how it knows that it is the same one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from hub_router.composition.attach import routed_updates
from hub_router.composition.base_model import load_model
from hub_router.errors import ArtifactError, MissingError

BUNDLED = "base"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAMPLES = 16


def describe_base(model: Any, folder: Path) -> dict[str, Any]:
    """Say where the base model comes from; save a copy where nothing else would bring it back.

    Args:
        model (PreTrainedModel): the base model, routed or not.
        folder (Path): the composition's folder.

    Returns:
        dict: ``reference`` (a folder, a Hub id, or ``base`` for the copy), ``revision``, ``dtype``, ``fingerprint``.
    """
    reference = str(getattr(model, "name_or_path", "") or "")
    revision = None
    if reference and (Path(reference) / "config.json").is_file():
        reference = str(Path(reference).absolute())
    elif _HUB_ID.fullmatch(reference) and _in_cache(reference):
        revision = getattr(model.config, "_commit_hash", None)
    else:
        model.save_pretrained(folder / BUNDLED)
        reference = ""
    return {
        "reference": reference,
        "revision": revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }


def restore_base(
    entry: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], folder: Path, device: torch.device | str | None
) -> Any:
    """Load the base model that :func:`describe_base` described.

    Args:
        entry (Mapping[str, Any]): what it returned.
        buffers (Mapping[str, torch.Tensor]): :func:`loose_buffers` of the model described.
        folder (Path): the composition's folder.
        device (torch.device | str | None): where to put the model; None leaves it on the CPU.

    Returns:
        PreTrainedModel: in the dtype that it had.

    Raises:
        MissingError: it is not where it was.
        ArtifactError: its weights are not those that the adapters were composed with.
    """
    reference = entry["reference"] or str(folder / BUNDLED)
    try:
        model = load_model(reference, device, getattr(torch, entry["dtype"]), entry["revision"])
    except MissingError as error:
        raise MissingError(f"{error}; where it moved, pass the base model as load(..., model=...)") from error
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(leaf, buffer.to(module.get_buffer(leaf).device), persistent=False)
    got = fingerprint(model)
    if got != entry["fingerprint"]:
        raise ArtifactError(
            f"base model {reference} has fingerprint {got}, expected {entry['fingerprint']}: its weights were changed "
            f"since {folder} was saved; pass the base model as load(..., model=...)"
        )
    return model


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
    """A hash over every parameter's name and shape and a few of its values, cheap for a model of any size.

    Args:
        model (nn.Module): any model; adapters attached to it do not count.

    Returns:
        str: sha256.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64)
        digest.update(flat[places.long().to(flat.device)].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _in_cache(reference: str) -> bool:
    """Whether a Hub id was downloaded to this machine."""
    try:
        return cached_file(reference, "config.json", local_files_only=True) is not None
    except OSError:
        return False
