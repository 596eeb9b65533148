"""Cached files of one encoder: a folder that is never changed once ``current.json`` names it.

That file is replaced atomically and says which generation of the store's rows the folder holds. Two processes may build
at once: each publishes a whole folder, and the later one stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

POINTER = "current.json"
# What reading a damaged file raises; FAISS trusts the sizes in a file and may ask for more memory than there is.
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, MemoryError)
# What writing raises; FAISS reports a full disk as a RuntimeError.
UNWRITABLE = (OSError, RuntimeError)
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True)
class Build:
    """What ``current.json`` says of the folder that it names.

    Args:
        encoder (str): the encoder's name.
        generation (int): of the rows in the store.
        dimension (int): D of the encoder.
        rows (int): number of vectors.
        trained_rows (int): number of vectors that the cells were laid for.
        changed_rows (int): number of vectors that came or went since.
        folder (str): name of the folder.
    """

    encoder: str
    generation: int
    dimension: int
    rows: int
    trained_rows: int
    changed_rows: int
    folder: str = ""


@lru_cache(maxsize=64)
def home_of(index_dir: Path, encoder: str, kind: str = "") -> Path:
    """Folder of one encoder's builds of one kind."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", encoder).strip("-.")[-40:]
    named = f"{readable}-{hashlib.sha256(encoder.encode()).hexdigest()[:8]}"
    return index_dir / (f"{named}-{kind}" if kind else named)


def current_build(home: Path) -> Build | None:
    """The build that ``current.json`` names; None where there is none or the file is damaged."""
    try:
        written = (home / POINTER).stat()
        build = _pointed(home, written.st_ino, written.st_mtime_ns, written.st_size)
    except (OSError, ValueError, TypeError):
        return None
    # The name comes from a file that anything may have written; it must not lead out of the folder.
    return build if re.fullmatch(r"build-[0-9a-f]{12}", str(build.folder)) else None


@lru_cache(maxsize=16)
def _pointed(home: Path, *_written: int) -> Build:
    """What the pointer says, read once for as long as it stays the same file; every search asks."""
    return Build(**json.loads((home / POINTER).read_text()))


def publish(home: Path, write: Callable[[Path], Build]) -> None:
    """Writes a folder of its own and makes ``current.json`` name it; the folder named before is removed.

    Args:
        home (Path): from :func:`home_of`.
        write (Callable[[Path], Build]): writes the files into an empty folder and says what they are; the folder is
            named here.

    Raises:
        OSError: the folder cannot be written to; what was current still is.
    """
    folder = home / f"build-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    try:
        build = write(folder)
        draft = folder / POINTER
        draft.write_text(json.dumps(asdict(replace(build, folder=folder.name)), indent=1))
        before = current_build(home)
        draft.replace(home / POINTER)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    replaced = before.folder if before is not None else ""
    for other in home.glob("build-*"):
        # Another process may be writing a younger one; what a killed one left behind grows old.
        with suppress(OSError):
            abandoned = time.time() - other.stat().st_mtime > _ABANDONED_SECONDS
            if other.name == replaced or (abandoned and other.name != folder.name):
                shutil.rmtree(other)


def changes(before: tuple[np.ndarray, np.ndarray], now: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What has to leave a build and what has to enter it.

    Args:
        before (tuple[np.ndarray, np.ndarray]): catalog ids and marks of the build.
        now (tuple[np.ndarray, np.ndarray]): catalog ids and marks of the store.

    Returns:
        tuple[np.ndarray, np.ndarray]: catalog ids int64 that are gone or changed, and those that are new or changed.
    """
    old = dict(zip(before[0].tolist(), before[1].tolist(), strict=True))
    new = dict(zip(now[0].tolist(), now[1].tolist(), strict=True))
    leaving = [adapter_id for adapter_id, mark in old.items() if new.get(adapter_id) != mark]
    entering = sorted(adapter_id for adapter_id, mark in new.items() if old.get(adapter_id) != mark)
    return np.array(leaving, dtype=np.int64), np.array(entering, dtype=np.int64)
