"""Turns an adapter of another PEFT type into an ordinary LoRA folder with PEFT's own conversion, and measures the loss.

No base model is loaded: what PEFT converts is the update alone, so a skeleton of the adapted modules is enough.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE, SAFETENSORS_FILE
from hub_router.lora.conversion_record import ConversionRecord, ConvertedModule
from hub_router.lora.convertible import check_rank, config_fields, convertible
from hub_router.lora.fields import Fields, names
from hub_router.lora.folder import write_config
from hub_router.lora.skeleton import ADAPTER, PEFT_PREFIX, Widths, build, split, widths
from hub_router.lora.weights import find_weights, hash_weights, load_weights
from hub_router.progress import SILENT, Progress

# Hidden, so that no sync of the folder above takes a half-written adapter for one.
TEMPORARY = ".converting-"
_ATTEMPTS = 3


def source_hash(folder: Path) -> str:
    """Identity of an adapter of another type: all that a conversion reads.

    Args:
        folder (Path): folder of the adapter.

    Returns:
        str: sha256 over the weight files and the config.

    Raises:
        UnsupportedAdapterError: it has no weights.
        OSError: a file cannot be read.
    """
    return hash_weights(find_weights(folder, "LORA"), json.dumps(config_fields(folder), sort_keys=True))


def peft_version() -> str:
    """Version of the PEFT that converts."""
    return version("peft")


def is_current(folder: Path, record: ConversionRecord, digest: str, rank: int | float) -> bool:
    """Whether a conversion is whole and what converting again would give.

    Args:
        folder (Path): where it lies.
        record (ConversionRecord): its record.
        digest (str): :func:`source_hash` of the adapter.
        rank (int | float): rank asked for.
    """
    made = (record.source_hash, record.peft_version, record.rank)
    return made == (digest, peft_version(), rank) and all(
        (folder / name).is_file() for name in (CONFIG_FILE, SAFETENSORS_FILE)
    )


def convert(
    folder: Path,
    to: Path,
    rank: int | float,
    *,
    source: str | None = None,
    base: Widths | None = None,
    beside: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> ConversionRecord:
    """Convert an adapter to LoRA with PEFT's ``convert_to_lora``, module by module.

    The update dW of each module, as PEFT's own layer computes it in float32, is cut to its largest singular values.
    MiSS is written as LoRA exactly, whatever rank was asked for. Parameters saved beside the update are taken over as
    they are. The folder is written whole or not at all; one that is there already is replaced.

    Args:
        folder (Path): folder of the adapter, with ``adapter_config.json`` and weights.
        to (Path): folder to write.
        rank (int | float): rank, at most that of the module's smaller width; or the share of the squared singular
            values to keep, by which PEFT chooses a rank for each module.
        source (str | None): what to call the adapter in the record; the folder if None.
        base (Widths | None): ``(D_out, D_in)`` of the base model's linear modules, in its order; needed where
            :func:`hub_router.lora.convertible.convertible` says so.
        beside (Mapping[str, str] | None): further text files to write, by name.
        progress (Progress): where to report.

    Returns:
        ConversionRecord: ranks and errors, as written to ``conversion.json``.

    Raises:
        SettingsError: the rank is none.
        UnsupportedAdapterError: the adapter cannot be read or converted; the message is the one reason.
        OSError: a file cannot be read or written.
    """
    check_rank(rank)
    fields = config_fields(folder) or {}
    kind, peft_type = convertible(fields), str(fields.get("peft_type"))
    if kind.needs_shapes and base is None:
        raise UnsupportedAdapterError(f"unsupported: {peft_type}, its tensors do not tell the widths of its modules")
    tensors = load_weights(find_weights(folder, "LORA"))
    modules, shared, others = split(tensors, kind)
    shapes = widths(peft_type, modules, shared, base if kind.needs_shapes else None)
    own = {name: tensor for name, tensor in tensors.items() if name not in others}
    layers = build(peft_type, fields, own, shapes)
    factors: dict[str, torch.Tensor] = {}
    measured: dict[str, ConvertedModule] = {}
    with progress.task(f"Converting {folder.name}", len(layers)) as advance:
        for module, layer in layers.items():
            A, B, error = _convert_module(module, layer, shapes[module], rank)
            factors |= {f"{PEFT_PREFIX}{module}.lora_A.weight": A, f"{PEFT_PREFIX}{module}.lora_B.weight": B}
            measured[module] = ConvertedModule(len(A), error)
            advance(1)
    record = ConversionRecord(source or str(folder), source_hash(folder), peft_type, peft_version(), rank, measured)
    _write(to, {**factors, **others}, fields, record, beside or {})
    return record


@torch.no_grad()
def _convert_module(
    module: str, layer: nn.Module, shape: tuple[int, int], rank: int | float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A ``(r, D_in)``, B ``(D_out, r)`` and the relative error of one module."""
    from peft.tuners.lora.conversion import convert_to_lora

    at_most = min(rank, *shape) if isinstance(rank, int) else rank
    try:
        update = _update(layer, shape)  # [D_out, D_in]
        if tuple(update.shape) != shape or not torch.isfinite(update).all():
            raise ValueError(
                f"its update of shape {list(update.shape)} is not of the module's {list(shape)}, or not finite"
            )
        _, factors = convert_to_lora(nn.ModuleDict({"layer": layer}), rank=at_most, adapter_name=ADAPTER)
    # RuntimeError: tensors that do not fit each other, too little memory, singular values that do not converge.
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedAdapterError(
            f"{module}: PEFT cannot convert it: {' '.join(str(error).split())[:200]}"
        ) from error
    A, B = factors["layer.lora_A.weight"], factors["layer.lora_B.weight"]
    exact = update.double()
    size = exact.norm().item()
    left = torch.addmm(exact, B.double(), A.double(), alpha=-1).norm().item()
    # A zero update converts to zero factors.
    return A, B, left / size if size else 0.0


def _update(layer: nn.Module, shape: tuple[int, int]) -> torch.Tensor:
    """The update dW ``(D_out, D_in)`` of PEFT's layer."""
    # MiSS adds the update to a weight that it is given.
    if hasattr(layer, "get_delta_weight_miss"):
        return layer.get_delta_weight_miss(ADAPTER, torch.zeros(shape))  # type: ignore[operator]
    return layer.get_delta_weight(ADAPTER)  # type: ignore[operator]


def _write_config(folder: Path, fields: Fields, modules: Mapping[str, ConvertedModule]) -> None:
    """``adapter_config.json``; alpha is r everywhere, for the scaling is in the factors."""
    from peft import TaskType

    ranks = {name: module.rank for name, module in modules.items()}
    base, task, mapping = (fields.get(name) for name in ("base_model_name_or_path", "task_type", "auto_mapping"))
    known = isinstance(mapping, dict) and str(mapping.get("parent_library")).startswith("transformers.")
    write_config(
        folder,
        ranks,
        ranks,
        base_model_name_or_path=base if isinstance(base, str) else None,
        task_type=task if task in list(TaskType.__members__) else None,
        auto_mapping=mapping if known else None,
        modules_to_save=list(names(fields, "modules_to_save")) or None,
    )


def _write(
    to: Path,
    tensors: Mapping[str, torch.Tensor],
    fields: Fields,
    record: ConversionRecord,
    beside: Mapping[str, str],
) -> None:
    """Write all files into a hidden folder beside the target, then rename it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=to.parent))
    try:
        new = made / "new"
        new.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / SAFETENSORS_FILE)
        _write_config(new, fields, record.modules)
        record.write(new)
        for name, text in beside.items():
            (new / name).write_bytes(text.encode())
        _place(new, to, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _place(new: Path, to: Path, aside: Path) -> None:
    """Give the new folder its name; a folder of that name goes aside first, for no file system replaces a full one."""
    for attempt in range(_ATTEMPTS):
        try:
            new.rename(to)
            return
        except OSError:
            # Another process may have put its own there in between.
            if not to.is_dir() or attempt == _ATTEMPTS - 1:
                raise
            to.rename(aside / f"old-{attempt}")
