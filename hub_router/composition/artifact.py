"""A routed model in a folder: factors, router state and a manifest, exact to the bit and checked when read.

::

    composition.json       manifest: format, method, adapters, base model, hashes
    factors.safetensors    every adapter's tensors as stored, in their own dtypes; scalings are in the manifest
    state.safetensors      what the method made of them: router tensors, factors of its own; Gaussians of the adapters'
                           samples; the base's loose buffers
    tokenizer/  base/      the tokenizer; the base model where it has no folder or Hub id to come back from
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hub_router.composition.assemble import stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.plan import Planner
from hub_router.composition.reference import describe_base, loose_buffers
from hub_router.composition.trained import trained_key
from hub_router.errors import ArtifactError
from hub_router.features import PoolFeatures
from hub_router.gaussian import Gaussian
from hub_router.lora.adapter import LoraAdapter, LoraFactors, SavedParameter
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Prepared, Router
from hub_router.routing.candidates import select
from hub_router.routing.registry import hyperparameters_of

MANIFEST = "composition.json"
FACTORS = "factors.safetensors"
STATE = "state.safetensors"
TOKENIZER = "tokenizer"
FORMAT = "hub-router composition"
VERSION = 3
# Version 2 knew no methods that decide per sequence, and is read as before.
_READABLE = (2, VERSION)
# No module path holds a space, so these keys never meet those of the router state.
_BUFFER = "base buffer/"
_SAVED = "base parameter/"
_PLAN = "plan state/"
_TASK = "task gaussian/"


@dataclass(frozen=True, eq=False)
class PlanState:
    """What a sequence-level method decides by.

    Args:
        encoder (str): name of the sentence encoder.
        state (Mapping[str, torch.Tensor]): what its ``plan`` reads.
    """

    encoder: str
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a folder holds, read and checked.

    Args:
        method (str): registry name.
        hyperparameters (Mapping[str, Any]): the method's.
        adapters (tuple[LoraAdapter, ...]): the pool, as it was composed.
        prepared (Mapping[str, Prepared]): router state by module path, as it was when saved.
        base (Mapping[str, Any]): how to get the base model back.
        buffers (Mapping[str, torch.Tensor]): what a checkpoint of the base model leaves out.
        tokenizer (Path | None): folder of the tokenizer, where one was saved.
        plan (PlanState | None): of a method that decides per sequence.
        trained (bool): whether the router state holds trained vectors.
        features (PoolFeatures): Gaussians of the adapters' samples, where they were known.
    """

    method: str
    hyperparameters: Mapping[str, Any]
    adapters: tuple[LoraAdapter, ...]
    prepared: Mapping[str, Prepared]
    base: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor]
    tokenizer: Path | None
    plan: PlanState | None = None
    trained: bool = False
    features: PoolFeatures = field(default_factory=PoolFeatures)


def write(
    folder: Path,
    *,
    router: Router,
    adapters: Sequence[LoraAdapter],
    updates: Sequence[RoutedUpdate],
    model: Any,
    tokenizer: Any,
    planner: Planner | None = None,
    features: PoolFeatures | None = None,
) -> None:
    """Write a routed model; the folder appears whole or not at all.

    Args:
        folder (Path): new, empty, or an earlier composition, which is replaced.
        router (Router): the method.
        adapters (Sequence[LoraAdapter]): the pool.
        updates (Sequence[RoutedUpdate]): the live router state.
        model (PreTrainedModel): the base model.
        tokenizer (PreTrainedTokenizerBase | None): saved where there is one.
        planner (Planner | None): of a method that decides per sequence.
        features (PoolFeatures | None): whose Gaussians are kept, for other methods and pools.

    Raises:
        ArtifactError: the folder holds something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ArtifactError(f"{folder} holds something that is no composition; save to a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        features = features or PoolFeatures()
        known = {each.name: features.gaussians[each.name] for each in adapters if each.name in features.gaussians}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "method": {"name": router.name, "hyperparameters": hyperparameters_of(router)},
            "adapters": _write_factors(fresh / FACTORS, adapters),
            "modules": _write_state(fresh / STATE, updates, _beside(model, planner, known)),
            "tasks": {"encoder": features.encoder, "samples": {name: each.samples for name, each in known.items()}},
            "encoder": None if planner is None else planner.encoder.name,
            "trained": trained_key(router) in features.prototypes,
            "base": describe_base(model, fresh),
            "tokenizer": tokenizer is not None,
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh / TOKENIZER)
        manifest["sha256"] = {name: _sha256(fresh / name) for name in (FACTORS, STATE)}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _put(fresh, folder, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read(folder: Path) -> Artifact:
    """Read a routed model's folder and check it against its manifest.

    Args:
        folder (Path): written by :func:`write`.

    Returns:
        Artifact: adapters and router state on the CPU.

    Raises:
        ArtifactError: names the file that is missing, changed or of another format, with what was expected.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing, expected a folder written by RoutedModel.save") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}; save the composition again") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found is None or found[0] != FORMAT or found[1] not in _READABLE:
        raise ArtifactError(f"{path} has format and version {found}, expected {(FORMAT, VERSION)}")
    try:
        return _decode(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} lacks or garbles {error}; save the composition again") from error


def _decode(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    """The artifact of a manifest, its files checked first."""
    faults = [fault for name in (FACTORS, STATE) if (fault := _fault(folder / name, manifest["sha256"][name]))]
    if faults:
        raise ArtifactError("; ".join(faults) + "; save the composition again")
    factors, state = (_load(folder / name) for name in (FACTORS, STATE))
    adapters = tuple(_adapter(number, entry, factors) for number, entry in enumerate(manifest["adapters"]))
    bank = stack(adapters)
    return Artifact(
        method=manifest["method"]["name"],
        hyperparameters=manifest["method"]["hyperparameters"],
        adapters=adapters,
        prepared={
            name: _prepared(name, entry, bank.modules[name], state) for name, entry in manifest["modules"].items()
        },
        base=manifest["base"],
        buffers=_under(_BUFFER, state),
        tokenizer=folder / TOKENIZER if manifest["tokenizer"] else None,
        plan=None if manifest.get("encoder") is None else PlanState(manifest["encoder"], _under(_PLAN, state)),
        trained=bool(manifest.get("trained")),
        features=_features(manifest.get("tasks", {"encoder": None, "samples": {}}), state),
    )


def _prepared(name: str, entry: Mapping[str, Any], bank: ModuleBank, state: Mapping[str, torch.Tensor]) -> Prepared:
    """One module's router state, as it was when saved."""
    experts = tuple(entry["experts"])
    if entry["own_factors"]:
        chosen = replace(
            bank,
            A=state[f"{name}/A"],
            B=state[f"{name}/B"],
            ranks=tuple(entry["ranks"]),
            experts=experts,
            extras={expert: extra for expert, extra in bank.extras.items() if expert in experts},
        )
    else:
        chosen = select(bank, [bank.experts.index(expert) for expert in experts])
    tensors = {key: state[f"{name}/router/{key}"] for key in entry["tensors"]}
    return Prepared(
        chosen,
        tensors,
        entry["merge"],
        entry["own_factors"],
        state.get(f"{name}/gains"),
        state.get(f"{name}/shares"),
    )


def _put(fresh: Path, folder: Path, aside: Path) -> None:
    """Move a finished folder to its place; what was there comes back if that fails."""
    if folder.exists():
        folder.replace(aside)
    try:
        fresh.replace(folder)
    except BaseException:
        if aside.exists():
            aside.replace(folder)
        raise


def _write_factors(path: Path, adapters: Sequence[LoraAdapter]) -> list[dict[str, Any]]:
    """The factors file, and the manifest's entry for each adapter."""
    tensors: dict[str, torch.Tensor] = {}
    for number, adapter in enumerate(adapters):
        for module, factors in adapter.modules.items():
            tensors |= {f"{number}/{module}/{what}": tensor for what, tensor in factors.tensors.items()}
        tensors |= {f"{number}/{_SAVED}{path}": parameter.value for path, parameter in adapter.saved.items()}
    _save(tensors, path)
    return [
        {
            "name": adapter.name,
            "path": None if adapter.path is None else str(adapter.path),
            "base_model": adapter.base_model,
            "weights_hash": adapter.weights_hash,
            "notes": list(adapter.notes),
            "scaling": {module: factors.scaling for module, factors in adapter.modules.items()},
            "lookups": [module for module, factors in adapter.modules.items() if factors.lookup],
            "saved": {path: parameter.apart for path, parameter in adapter.saved.items()},
            "not_stored": list(adapter.not_stored),
        }
        for adapter in adapters
    ]


def _adapter(number: int, entry: Mapping[str, Any], factors: Mapping[str, torch.Tensor]) -> LoraAdapter:
    """One adapter back from the manifest and the factors file."""
    lookups = frozenset(entry["lookups"])
    modules = {
        module: LoraFactors(
            factors[f"{number}/{module}/A"],
            factors[f"{number}/{module}/B"],
            scaling,
            factors.get(f"{number}/{module}/magnitude"),
            factors.get(f"{number}/{module}/bias"),
            module in lookups,
        )
        for module, scaling in entry["scaling"].items()
    }
    saved = {path: SavedParameter(factors[f"{number}/{_SAVED}{path}"], apart) for path, apart in entry["saved"].items()}
    return LoraAdapter(
        entry["name"],
        None if entry["path"] is None else Path(entry["path"]),
        entry["base_model"],
        modules,
        entry["weights_hash"],
        tuple(entry["notes"]),
        saved=saved,
        not_stored=tuple(entry["not_stored"]),
    )


def _write_state(
    path: Path, updates: Sequence[RoutedUpdate], beside: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """The state file, and the manifest's entry for each module."""
    tensors = dict(beside)
    for update in updates:
        if update.own_factors is not None:
            A, B = update.own_factors
            tensors |= {f"{update.module}/A": A, f"{update.module}/B": B}
        if update.computed_gains is not None:
            tensors[f"{update.module}/gains"] = update.computed_gains
        if update.shares is not None:
            tensors[f"{update.module}/shares"] = update.shares
        tensors |= {f"{update.module}/router/{name}": tensor for name, tensor in update.state().items()}
    _save(tensors, path)
    return {
        update.module: {
            "experts": update.experts.tolist(),
            "ranks": list(update.ranks),
            "merge": update.merge,
            "own_factors": update.own_factors is not None,
            "tensors": list(update.state_names),
        }
        for update in updates
    }


def _beside(model: Any, planner: Planner | None, known: Mapping[str, Gaussian]) -> dict[str, torch.Tensor]:
    """What belongs to no module: buffers that the base's checkpoint lacks, and what plans are made from."""
    plan = {} if planner is None else planner.state
    tensors = {_BUFFER + name: buffer for name, buffer in loose_buffers(model).items()}
    tensors |= {_PLAN + name: tensor for name, tensor in plan.items()}
    for name, each in known.items():
        tensors[f"{_TASK}{name}/mean"] = torch.tensor(each.mean)
        tensors[f"{_TASK}{name}/factors"] = torch.tensor(each.factors)
    return tensors


def _features(entry: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> PoolFeatures:
    """The Gaussians of the adapters' samples."""
    gaussians = {
        name: Gaussian(state[f"{_TASK}{name}/mean"].numpy(), state[f"{_TASK}{name}/factors"].numpy(), samples)
        for name, samples in entry["samples"].items()
    }
    return PoolFeatures(gaussians=gaussians, encoder=entry["encoder"])


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose keys begin so, by the rest of the key."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors, copying those that share memory, which the format refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.detach().clone() if storage in seen else tensor.detach().contiguous()
        seen.add(storage)
    save_file(apart, path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; save the composition again") from error


def _fault(path: Path, expected: str) -> str | None:
    """What is wrong with a file, by its hash."""
    if not path.is_file():
        return f"{path} is missing"
    got = _sha256(path)
    return None if got == expected else f"{path} was changed: got sha256 {got}, expected {expected}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
