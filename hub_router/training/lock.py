"""One run at a time over a folder of checkpoints: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hub_router.errors import TrainingError

_LOG = logging.getLogger(__name__)
# Windows keeps others from reading the bytes that are locked, and the holder's name stands at the beginning.
_BYTE = 1 << 30
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
# By which launchers say which of a run's processes this one is.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs away from a folder while the block runs; of a run of several processes the first one does.

    The lock is a file beside the folder. A process that is killed holds it no longer, whatever it left behind.

    Args:
        folder (Path): of checkpoints; need not exist.

    Raises:
        TrainingError: another run holds it; names its process.
    """
    if not is_first_process():
        yield
        return
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, folder)
    try:
        yield
    finally:
        if sys.platform == "win32":
            file.close()
        # Before it is closed elsewhere: once it is free, the file may be another run's.
        with suppress(OSError):
            path.unlink()
        file.close()


def is_first_process() -> bool:
    """Whether this is the process of a run that writes files; a run of one process has no other."""
    return all(os.environ.get(name, "0") in ("", "0", "-1") for name in _RANKS)


def _acquire(path: Path, folder: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            _lock(file)
        except OSError as error:
            file.close()
            if error.errno in _TAKEN:
                raise TrainingError(_told(path, folder)) from None
            _LOG.warning("%s cannot be locked (%s); do not start the same run twice", path, error)
            return path.open("a+b")
        if _is_current(file, path):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
            file.flush()
            return file
        # Its holder removed it between the two lines above.
        file.close()


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_current(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _told(path: Path, folder: Path) -> str:
    """Who holds a lock."""
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {time.ctime(holder['since'])}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process, which has only just begun"
    return (
        f"this run is going on already: {who}, holds {folder}; wait for it, or give this run another --name (or --out)"
    )
