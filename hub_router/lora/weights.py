"""Weight files of an adapter: found, memory-mapped and turned into named tensors without executing anything."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import BIN_FILE, MLX_FILE, SAFETENSORS_FILE
from hub_router.lora.config import Kind
from hub_router.lora.formats import describe_file, describe_folder

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MAX_INDEX_BYTES = 16_000_000

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(?:safetensors|bin)")
_MAX_PICKLE = 1 << 24
_BLOCKED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def find_weights(folder: Path, kind: Kind) -> tuple[Path, ...]:
    """The weight files of an adapter folder: safetensors first, then ``.bin``; one file before shards.

    Args:
        folder (Path): folder of the adapter.
        kind (str): whose format the config is.

    Returns:
        tuple[Path, ...]: one file, or the shards that an index names, in its order.

    Raises:
        UnsupportedAdapterError: the folder holds none, or its index is faulty or names files that are not there.
    """
    wanted = (MLX_FILE,) if kind == "MLX" else (SAFETENSORS_FILE, BIN_FILE)
    for name in wanted:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return tuple(folder / shard for shard in dict.fromkeys(_weight_map(index).values()))
    found = describe_folder(folder)
    raise UnsupportedAdapterError(f"no weights: expected {' or '.join(wanted)}" + (f", found {found}" if found else ""))


def hash_weights(paths: Sequence[Path], function_fields: str) -> str:
    """Identity of the function that an adapter computes.

    Args:
        paths (Sequence[Path]): weight files.
        function_fields (str): canonical JSON of the config fields that change the function.

    Returns:
        str: sha256 (hex) of the files' bytes followed by that JSON.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    digest.update(function_fields.encode())
    return digest.hexdigest()


def load_weights(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors of an adapter, on the CPU, backed by the files where their format allows.

    Args:
        paths (Sequence[Path]): from :func:`find_weights`.

    Returns:
        dict[str, torch.Tensor]: tensors by stored name, in file order.

    Raises:
        UnsupportedAdapterError: a file cannot be used, or the shards do not hold what their index says.
    """
    if len(paths) == 1 and not _SHARD.fullmatch(paths[0].name):
        return load_tensors(paths[0])
    stem = paths[0].name.split("-")[0] + paths[0].suffix
    placed = _weight_map(paths[0].with_name(f"{stem}.index.json"))
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        stored = load_tensors(path)
        expected = {name for name, shard in placed.items() if shard == path.name}
        if stored.keys() != expected:
            wrong = sorted(stored.keys() ^ expected)
            raise UnsupportedAdapterError(
                f"{path.name} and {stem}.index.json differ in {len(wrong)} tensors, the first is {wrong[0][:200]!r}"
            )
        tensors |= stored
    return tensors


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one weight file, on the CPU, backed by the file where its format allows.

    Args:
        path (Path): a ``.safetensors`` or ``.bin`` file.

    Returns:
        dict[str, torch.Tensor]: tensors by stored name, in file order.

    Raises:
        UnsupportedAdapterError: the file is not what its name says, asks for more than tensors, or holds tensors
            that are not dense floating-point data.
    """
    what = describe_file(path)
    if what:
        raise UnsupportedAdapterError(f"{path.name} is {what}")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not tensors:
        raise UnsupportedAdapterError(f"{path.name} holds no tensors")
    for name, tensor in tensors.items():
        _check_dense(path, name, tensor)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor, as an index file says; every shard lies beside it."""
    size = index.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise UnsupportedAdapterError(f"{index.name} has {size} bytes, expected at most {MAX_INDEX_BYTES}")
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UnsupportedAdapterError(
            f"{index.name} has no weight_map: {type(error).__name__}: {error}"[:300]
        ) from error
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise UnsupportedAdapterError(f"{index.name}: weight_map maps no tensors to files")
    shards = list(dict.fromkeys(placed.values()))
    foreign = [shard for shard in shards if not _SHARD.fullmatch(shard)]
    if foreign:
        raise UnsupportedAdapterError(
            f"{index.name} names {foreign[0][:200]!r}, expected shards such as adapter_model-00001-of-00002.safetensors"
        )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UnsupportedAdapterError(
            f"{index.name} names {len(shards)} shards, {len(missing)} are missing, such as {missing[0]}"
        )
    return placed


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; pages are read when a tensor is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UnsupportedAdapterError(f"{path.name} is no usable safetensors file: {_line(error)}") from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``torch.save`` file, read by the unpickler that knows nothing but tensors and containers."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    try:
        if archive:
            _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UnsupportedAdapterError:
        raise
    except Exception as error:
        wanted = _BLOCKED_GLOBAL.findall(str(error)) or _foreign_globals(path, archive)
        if wanted:
            reason = f"{path.name} is a pickle that asks for {', '.join(sorted(set(wanted))[:3])}: not loaded"
        else:
            reason = f"{path.name} is no usable torch file: {_line(error)}"
        raise UnsupportedAdapterError(reason) from error
    if not isinstance(loaded, Mapping):
        raise UnsupportedAdapterError(f"{path.name} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return _tensors_of(path, loaded)


def _tensors_of(path: Path, loaded: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The loaded dictionary, every entry a named tensor."""
    wrong = [
        f"{str(name)[:80]!r}: {type(value).__name__}"
        for name, value in loaded.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if wrong:
        raise UnsupportedAdapterError(
            f"{path.name}: {len(wrong)} entries are no named tensors, the first is {wrong[0]}"
        )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_archive(path: Path) -> None:
    """Refuse archives that unpack to more than their own size: ``torch.save`` never compresses."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise UnsupportedAdapterError(
            f"{path.name} has {size} bytes but unpacks to {unpacked}, expected no compression"
        )


def _check_dense(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse what arithmetic over all elements could not read: sparse, expanded, empty or integer tensors."""
    where = f"{path.name}: {name[:200]!r}"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsupportedAdapterError(f"{where} is a {tensor.layout} tensor on {tensor.device}, expected a dense one")
    if tensor.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        got = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedAdapterError(f"{where} has dtype {got}, expected one of {expected}")
    if tensor.numel() == 0:
        raise UnsupportedAdapterError(f"{where} is empty (shape {tuple(tensor.shape)}), a shard was not gathered")
    # A pickle may declare strides of zero: a few stored bytes that claim to be a matrix of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UnsupportedAdapterError(f"{where} claims shape {tuple(tensor.shape)} but stores fewer elements")


def _foreign_globals(path: Path, archive: bool) -> list[str]:
    """Importable names in a pickle that are neither torch's nor containers, found without executing it."""
    stream = io.BytesIO(_pickle_bytes(path, archive))
    # A torch file from before zip archives is several pickles in a row, the tensors' being the fourth.
    found = [name for _ in range(1 if archive else 5) for name in _globals_in(stream)]
    return [name for name in found if not name.startswith(("torch.", "collections.OrderedDict"))]


def _pickle_bytes(path: Path, archive: bool) -> bytes:
    """The start of the pickle in a torch file; nothing where the archive is too damaged to say."""
    if not archive:
        with path.open("rb") as file:
            return file.read(_MAX_PICKLE)
    try:
        with zipfile.ZipFile(path) as file:
            name = next(entry for entry in file.namelist() if entry.endswith("data.pkl"))
            with file.open(name) as member:
                return member.read(_MAX_PICKLE)
    except (zipfile.BadZipFile, zlib.error, EOFError, StopIteration, ValueError, RuntimeError, OSError):
        return b""


def _globals_in(stream: io.BytesIO) -> Iterator[str]:
    """``module.name`` of each import in the pickle at the stream's place, up to where it stops being one."""
    texts: list[str] = []
    memo: dict[object, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                yield ".".join(texts[-2:])
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and texts:
                memo[argument] = texts[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
                texts.append(memo[argument])
            elif isinstance(argument, str):
                texts.append(argument)
    except (ValueError, pickle.UnpicklingError):
        return


def _line(error: BaseException) -> str:
    """The message of a foreign error: its last informative line, bounded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Check the documentation", "Weights only load failed"))]
    text = lines[-1] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
