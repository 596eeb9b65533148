"""Prototype sets outside the catalog: trained vectors per adapter and module, their file, and how far two sets differ.

A file is one of safetensors: a tensor ``PLACE/MODULE`` per vector, PLACE being the member's place from 0, and in the
header one JSON document with everything else. Equal sets give equal bytes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hub_router.errors import ArtifactError, HubRouterError

VERSION = 1
_KEY = "hub_router.prototypes"
_EXPECTED = "expected a prototype set as hub-router prototypes export writes it"
# Of faults, each a line; a broken file may have one per vector.
_SHOWN = 20
# Lengths that the catalog's columns hold.
_TEXTS = {"method": (1, 64), "base_model": (1, 1024), "parent": (0, 64), "data_hash": (0, 64)}
_LONGEST_NAME = 2200
_LONGEST_HASH = 64
_LONGEST_MODULE = 512
_SEEDS = range(2**31)


@dataclass(frozen=True, eq=False)
class PrototypeMember:
    """One adapter's vectors.

    Args:
        name (str): the adapter's name in the pool; of a set from the catalog its reference.
        weights_hash (str): identity of the adapter's weights that the vectors were made for.
        vectors (Mapping[str, np.ndarray]): float32 ``(D,)`` by module path.
    """

    name: str
    weights_hash: str
    vectors: Mapping[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Prototypes:
    """A prototype set: what a training method made for a pool, and from what.

    Args:
        method (str): registry name of the method that made the vectors.
        base_model (str): Hub id or folder of the base model.
        members (tuple[PrototypeMember, ...]): one per adapter.
        parent (str): what it was refined from: a method such as ``arrow``, or a set such as ``gates@2``.
        hyperparameters (Mapping[str, Any]): settings of the training, JSON values.
        metrics (Mapping[str, Any]): what was measured of it, JSON values.
        data_hash (str): sha256 (hex) of the training data; empty where there was none.
        seed (int | None): of the training, 0 to 2^31 - 1.
    """

    method: str
    base_model: str
    members: tuple[PrototypeMember, ...] = field(repr=False)
    parent: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data_hash: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class ModuleCosines:
    """How alike two sets are in one module.

    Args:
        module (str): its path.
        mean (float): of the cosines between the two vectors of each adapter.
        min (float): the smallest of them.
        shared (int): number of adapters that have a vector other than zero in both sets.
    """

    module: str
    mean: float
    min: float
    shared: int


def write_prototypes(path: Path, prototypes: Prototypes) -> None:
    """Write a set as one file, whole or not at all.

    Args:
        path (Path): the file; an older prototype set there is replaced.
        prototypes (Prototypes): the set.

    Raises:
        ArtifactError: the set is not one, the folder does not exist, or the path holds something else.
        OSError: the file cannot be written.
    """
    faults = prototype_faults(prototypes)
    if faults:
        raise ArtifactError(f"the prototype set cannot be written to {path}:\n{as_lines(faults)}")
    if not path.parent.is_dir():
        raise ArtifactError(f"{path} cannot be written, for {path.parent} is no folder; make it first")
    if (path.exists() or path.is_symlink()) and not _is_prototypes(path):
        raise ArtifactError(f"{path} holds something that is no prototype set and is left as it is; name another file")
    document = {
        "version": VERSION,
        **{name: getattr(prototypes, name) for name in (*_TEXTS, "seed")},
        "hyperparameters": dict(prototypes.hyperparameters),
        "metrics": dict(prototypes.metrics),
        "members": [{"name": member.name, "weights_hash": member.weights_hash} for member in prototypes.members],
    }
    tensors = {
        f"{place}/{module}": np.ascontiguousarray(vector)
        for place, member in enumerate(prototypes.members)
        for module, vector in member.vectors.items()
    }
    draft = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        # In one key, for the order of several is not the same every time.
        draft.write_bytes(save(tensors, metadata={_KEY: json.dumps(document, sort_keys=True)}))
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_prototypes(path: Path) -> Prototypes:
    """Read a set that :func:`write_prototypes` wrote.

    Args:
        path (Path): the file; may come from anyone.

    Returns:
        Prototypes: checked; each member's vectors by module path.

    Raises:
        ArtifactError: the file is missing, damaged, of another kind or of another version; names it, what is wrong with
            it and what was expected.
    """
    try:
        with safe_open(path, framework="np") as file:
            document = _document(path, file.metadata() or {})
            prototypes = _decode(path, document, file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {_EXPECTED}") from error
    _refuse(path, prototype_faults(prototypes))
    return prototypes


def prototype_faults(prototypes: Prototypes) -> list[str]:
    """Everything that keeps a set from being stored, written or read.

    Args:
        prototypes (Prototypes): any.

    Returns:
        list[str]: a line each: what, got, expected; empty for a sound set.
    """
    found = [line for name, bounds in _TEXTS.items() for line in _text_faults(name, getattr(prototypes, name), *bounds)]
    for name in ("hyperparameters", "metrics"):
        if not _is_json(getattr(prototypes, name)):
            found.append(f"{name}: got {getattr(prototypes, name)!r:.200}, expected an object of finite JSON values")
    seed = prototypes.seed
    if seed is not None and (type(seed) is not int or seed not in _SEEDS):
        found.append(f"seed: got {seed!r:.80}, expected a whole number from 0 to {_SEEDS[-1]}, or none")
    if not prototypes.members:
        found.append("members: got none, expected at least one adapter")
    counted = Counter(member.name for member in prototypes.members)
    found += [
        f"member {name!r:.200} occurs {count} times, expected once" for name, count in counted.items() if count > 1
    ]
    for member in prototypes.members:
        found += _member_faults(member)
    return found or list(_width_faults(prototypes.members))


def cosines(child: Prototypes, parent: Prototypes, *, signed: bool = True) -> tuple[ModuleCosines, ...]:
    """How alike two sets are, module by module; adapters are matched by name, and zero vectors have no direction.

    Args:
        child (Prototypes): a set.
        parent (Prototypes): another, such as the one that it was refined from.
        signed (bool): whether opposite vectors count as unlike; False for vectors whose sign is free, as Arrow's.

    Returns:
        tuple[ModuleCosines, ...]: of every module with a shared adapter, in the order of the layers.

    Raises:
        HubRouterError: vectors of one adapter and module have different lengths; names all of them.
    """
    theirs = {member.name: member.vectors for member in parent.members}
    found: dict[str, list[float]] = {}
    unlike: list[str] = []
    for member in child.members:
        others = theirs.get(member.name, {})
        for module, own in member.vectors.items():
            other = others.get(module)
            if other is None:
                continue
            if own.shape != other.shape:
                unlike.append(f"adapter {member.name!r}, module {module}: shapes {own.shape} and {other.shape}")
                continue
            a, b = own.astype(np.float64), other.astype(np.float64)
            lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
            if lengths:
                cosine = float(a @ b) / lengths
                found.setdefault(module, []).append(cosine if signed else abs(cosine))
    if unlike:
        raise HubRouterError(f"the sets are of different models or methods and cannot be compared:\n{as_lines(unlike)}")
    return tuple(
        ModuleCosines(module, float(np.mean(found[module])), min(found[module]), len(found[module]))
        for module in sorted(found, key=_by_layer)
    )


def mean_cosine(modules: Sequence[ModuleCosines]) -> float:
    """Mean of the cosines of all modules and adapters.

    Args:
        modules (Sequence[ModuleCosines]): from :func:`cosines`, at least one.

    Returns:
        float: every vector counts once.
    """
    return sum(module.mean * module.shared for module in modules) / sum(module.shared for module in modules)


def as_lines(faults: Sequence[str]) -> str:
    """Faults as an indented list; of very many the first ones and their number."""
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "\n".join(f"  - {fault}" for fault in [*faults[:_SHOWN], *more])


def _by_layer(module: str) -> list[tuple[int, str]]:
    """Sorts the numbers in a module's path by their value."""
    parts = re.split(r"([0-9]+)", module)
    # Compared by length first, which for digits is by value, and needs no number of any size.
    return [(len(part.lstrip("0")), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _text_faults(what: str, value: Any, least: int, most: int) -> Iterator[str]:
    if not (isinstance(value, str) and least <= len(value) <= most and value.isprintable()):
        yield f"{what}: got {value!r:.200}, expected printable text of {least} to {most} characters"


def _member_faults(member: PrototypeMember) -> Iterator[str]:
    """What is wrong with one adapter's part of a set."""
    yield from _text_faults("name of a member", member.name, 1, _LONGEST_NAME)
    who = f"member {member.name!r:.200}"
    yield from _text_faults(f"{who}, weights_hash", member.weights_hash, 1, _LONGEST_HASH)
    if not member.vectors:
        yield f"{who} has no vectors, expected at least one"
    for module, vector in member.vectors.items():
        yield from _text_faults(f"{who}, name of a module", module, 1, _LONGEST_MODULE)
        where = f"{who}, module {module!s:.200}"
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.ndim != 1 or not vector.size:
            got = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
            yield f"{where}: got {got}, expected a vector (D,) of float32"
        elif not np.isfinite(vector).all():
            yield f"{where}: {np.count_nonzero(~np.isfinite(vector))} of {vector.size} numbers are not finite"


def _width_faults(members: Iterable[PrototypeMember]) -> Iterator[str]:
    """Modules whose vectors differ in length, though all read the same input."""
    widths: dict[str, dict[int, str]] = {}
    for member in members:
        for module, vector in member.vectors.items():
            widths.setdefault(module, {}).setdefault(vector.size, member.name)
    for module, seen in widths.items():
        if len(seen) > 1:
            listed = ", ".join(f"{width} ({name:.200})" for width, name in seen.items())
            yield f"module {module}: vectors of lengths {listed}, expected one length"


def _is_json(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_prototypes(path: Path) -> bool:
    """Whether a file says in its header that it is a prototype set, of whatever version."""
    try:
        with safe_open(path, framework="np") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _document(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON document of a file's header."""
    if _KEY not in metadata:
        raise ArtifactError(f"{path} is no prototype set: its header has no {_KEY!r}; {_EXPECTED}")
    try:
        document = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {_KEY!r} in its header is no JSON: {error}; {_EXPECTED}") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise ArtifactError(
            f"{path} is of version {version!r:.80}, expected {VERSION}; a newer file needs a newer hub-router: "
            "pip install --upgrade hub-router"
        )
    return dict(document)


def _decode(path: Path, document: Mapping[str, Any], file: Any) -> Prototypes:
    """The set that a file says it is; types are checked here, contents by the caller."""
    missing = [name for name in (*_TEXTS, "seed", "hyperparameters", "metrics", "members") if name not in document]
    _refuse(path, [f"its header has no {name!r}" for name in missing])
    listed = document["members"]
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        _refuse(path, [f"members: got {listed!r:.200}, expected a list of objects"])
    vectors: dict[str, dict[str, np.ndarray]] = {str(place): {} for place in range(len(listed))}
    faults = []
    for name in file.keys():  # noqa: SIM118 - the file is no mapping
        place, _, module = name.partition("/")
        stored = file.get_slice(name)
        if place not in vectors:
            faults.append(f"tensor {name!r:.200} belongs to no member, expected 0/MODULE to {len(listed) - 1}/MODULE")
        elif stored.get_dtype() != "F32" or len(stored.get_shape()) != 1:
            got = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
            faults.append(f"tensor {name!r:.200}: got {got}, expected a vector (D,) of F32")
        else:
            vectors[place][module] = file.get_tensor(name)
    _refuse(path, faults)
    members = tuple(
        PrototypeMember(entry.get("name"), entry.get("weights_hash"), vectors[str(place)])
        for place, entry in enumerate(listed)
    )
    wrong = [repr(member.name)[:200] for member in members if not isinstance(member.name, str)]
    _refuse(path, [f"name of a member: got {name}, expected text" for name in wrong])
    texts = {name: document[name] for name in _TEXTS}
    settings = {name: document[name] for name in ("hyperparameters", "metrics", "seed")}
    return Prototypes(members=members, **texts, **settings)


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        raise ArtifactError(f"{path} is no usable prototype set, {_EXPECTED}:\n{as_lines(faults)}")
