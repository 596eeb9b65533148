"""Checkpoints of a training run: whole or not at all, and only for the run that wrote them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hub_router.errors import TrainingError

_FILE = "training.pt"
# First line of the file, before the sha256 of what follows; torch's own format notices no flipped bit.
_FORMAT = b"hub-router training checkpoint 1"


def save(folder: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in the place of the one before.

    Args:
        folder (Path): made if need be.
        fingerprint (Mapping[str, Any]): what the run depends on, JSON values.
        state (Mapping[str, Any]): tensors and plain values, which ``torch.load(weights_only=True)`` reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"fingerprint": json.dumps(fingerprint, sort_keys=True), **state}, content)
    payload = content.getvalue()
    fresh = folder / f".{_FILE}.{os.getpid()}"
    try:
        with fresh.open("wb") as file:
            file.write(b"%s %s\n" % (_FORMAT, hashlib.sha256(payload).hexdigest().encode()))
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / _FILE)
    finally:
        fresh.unlink(missing_ok=True)


def load(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint.

    Args:
        folder (Path): as given to :func:`save`.
        fingerprint (Mapping[str, Any]): of the run that wants to go on.

    Returns:
        dict[str, Any] | None: the state; None where there is no checkpoint.

    Raises:
        TrainingError: the file is no checkpoint, or one of another run; says in what they differ.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    found = _read(path)
    _refuse_other(path, json.loads(found["fingerprint"]), _plain(fingerprint))
    return {key: value for key, value in found.items() if key != "fingerprint"}


def is_left(folder: Path, known: Mapping[str, Any]) -> bool:
    """Whether a stopped run is there that the one at hand would go on with.

    Args:
        folder (Path): as given to :func:`save`.
        known (Mapping[str, Any]): entries of the fingerprint that are known before any weights are loaded.

    Returns:
        bool: False where there is no checkpoint.

    Raises:
        TrainingError: as for :func:`load`, as far as the known entries tell.
    """
    path = folder / _FILE
    if not path.is_file():
        return False
    theirs = json.loads(_read(path)["fingerprint"])
    ours = {key: value for key, value in _plain(known).items() if key in theirs}
    _refuse_other(path, {key: theirs[key] for key in ours}, ours)
    return True


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that is whole."""
    head, _, payload = path.read_bytes().partition(b"\n")
    form, _, digest = head.rpartition(b" ")
    if form != _FORMAT or hashlib.sha256(payload).hexdigest().encode() != digest:
        raise TrainingError(
            f"{path} cannot be read as a checkpoint of this release: it is none, or was changed since it was written; "
            "remove it to start anew"
        )
    return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(fingerprint))


def _refuse_other(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of a run that depends on other things."""
    differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if differing:
        entries = [line for key in differing for line in _differences(key, theirs.get(key), ours.get(key))]
        lines = "\n".join(f"  - {line}" for line in entries)
        raise TrainingError(
            f"{path} is a checkpoint of another run:\n{lines}\nit was stopped; run that one to its end, or begin "
            "anew: --restart, or another folder"
        )


def _differences(key: str, theirs: Any, ours: Any) -> list[str]:
    """What differs, entry by entry."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        return [f"{name}: {theirs.get(name)!r}, now {ours.get(name)!r}" for name in names]
    return [f"{key}: {theirs!r}, now {ours!r}"]


def remove(folder: Path) -> None:
    """Forget a run that is done.

    Args:
        folder (Path): as given to :func:`save`; stays, if it holds anything else.
    """
    for path in (folder / _FILE, *folder.glob(f".{_FILE}.*")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
