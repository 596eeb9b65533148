"""Weight files of an adapter: found, memory-mapped and turned into named tensors without executing anything."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import BIN_FILE, MLX_FILE, SAFETENSORS_FILE
from hub_router.lora.config import Kind
from hub_router.lora.formats import describe_file, describe_folder
from hub_router.lora.text import escaped

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

MAX_INDEX_BYTES = 16_000_000
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 8

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(?:safetensors|bin)")
_MAX_PICKLE = 1 << 24
# All that a dictionary of tensors asks for. What torch.load allows beside these makes tensors of memory that nobody
# wrote to, takes as much memory as a number says, or gives tensors other methods.
_IMPORTS = re.compile(
    r"collections\.OrderedDict|torch\.(?:(?:cuda\.)?\w+Storage|Size|serialization\._get_layout"
    r"|_utils\._rebuild_(?:tensor|tensor_v2|parameter|sparse_tensor))"
)


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
    buffer = memoryview(bytearray(1 << 23))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
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
        UnsupportedAdapterError: the file is not what its name says, asks for more than tensors, holds more than
            ``MAX_TENSORS``, or such that are not dense floating-point data of its own.
    """
    what = describe_file(path)
    if what:
        raise UnsupportedAdapterError(f"{path.name} is {what}")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not tensors:
        raise UnsupportedAdapterError(f"{path.name} holds no tensors")
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors.values())}
    claimed, size = sum(storage.nbytes() for storage in storages.values()), path.stat().st_size
    if claimed > size:
        raise UnsupportedAdapterError(f"{path.name} has {size} bytes, but its tensors claim {claimed}")
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
            names = file.keys()
            _check_count(path, len(names))
            tensors = _views(path, names)
            if tensors is None:
                tensors = _dense(path, {name: file.get_tensor(name) for name in names})
            return tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UnsupportedAdapterError(f"{path.name} is no usable safetensors file: {_line(error)}") from error


def _views(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor] | None:
    """Tensors of a safetensors file whose header was checked, as views of one mapping, which is faster than one by one.

    None where something is not as usual: integers, many dimensions, data that do not lie on multiples of their size.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    length = path.stat().st_size
    mapping = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
    wholes = {name: mapping[: length - length % dtype.itemsize].view(dtype) for name, dtype in _DTYPES.items()}
    views = {}
    for name in names:
        entry = header[name]
        whole = wholes.get(entry["dtype"])
        start = 8 + size + entry["data_offsets"][0]
        shape = entry["shape"]
        if whole is None or start % whole.itemsize or len(shape) > MAX_DIMENSIONS:
            return None
        strides = list(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else []
        views[name] = whole.as_strided(shape, strides, start // whole.itemsize)
    return views


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``torch.save`` file, read by the unpickler that knows nothing but tensors and containers."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    try:
        if archive:
            _check_archive(path)
        _check_imports(path, archive)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UnsupportedAdapterError:
        raise
    except Exception as error:
        raise UnsupportedAdapterError(f"{path.name} is no usable torch file: {_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UnsupportedAdapterError(f"{path.name} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return _tensors_of(path, loaded)


def _tensors_of(path: Path, loaded: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """The loaded dictionary, every entry a named tensor."""
    _check_count(path, len(loaded))
    # Not loaded.items(): a pickle may put anything into the attributes of an ordered dictionary.
    entries = dict.items(loaded)
    wrong = [
        f"{str(name)[:80]!r}: {type(value).__name__}"
        for name, value in entries
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if wrong:
        raise UnsupportedAdapterError(
            f"{path.name}: {len(wrong)} entries are no named tensors, the first is {wrong[0]}"
        )
    return _dense(path, {name: tensor.detach() for name, tensor in entries})


def _check_count(path: Path, tensors: int) -> None:
    """Refuse more tensors than can be handled within reasonable time and memory."""
    if tensors > MAX_TENSORS:
        raise UnsupportedAdapterError(f"{path.name} holds {tensors} tensors, expected at most {MAX_TENSORS}")


def _check_archive(path: Path) -> None:
    """Refuse archives that unpack to more than their own size: ``torch.save`` never compresses."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise UnsupportedAdapterError(
            f"{path.name} has {size} bytes but unpacks to {unpacked}, expected no compression"
        )


def _dense(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Refuse what arithmetic over all elements could not read: sparse, expanded or integer tensors."""
    for name, tensor in tensors.items():
        where = f"{path.name}: {name[:200]!r}"
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise UnsupportedAdapterError(
                f"{where} is a {tensor.layout} tensor on {tensor.device}, expected a dense one"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            got = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedAdapterError(f"{where} has dtype {got}, expected one of {expected}")
        if tensor.ndim > MAX_DIMENSIONS:
            raise UnsupportedAdapterError(f"{where} has {tensor.ndim} dimensions, expected at most {MAX_DIMENSIONS}")
        # A pickle may declare strides of zero: a few stored bytes that claim to be a matrix of any size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UnsupportedAdapterError(f"{where} claims shape {tuple(tensor.shape)} but stores fewer elements")
    return tensors


def _check_imports(path: Path, archive: bool) -> None:
    """Refuse a pickle that asks for more than a dictionary of tensors needs; it is read, not executed."""
    found: list[str] = []
    broken = None
    try:
        for stream in _pickles(path, archive):
            for name in _globals_in(stream):
                found.append(name)
    except (ValueError, pickle.UnpicklingError) as error:
        broken = error
    foreign = sorted(escaped(name) for name in set(found) if not _IMPORTS.fullmatch(name))
    if foreign:
        raise UnsupportedAdapterError(f"{path.name} is a pickle that asks for {', '.join(foreign[:3])}: not loaded")
    if broken:
        raise UnsupportedAdapterError(f"{path.name} is no usable torch file: {_line(broken)}") from broken


def _pickles(path: Path, archive: bool) -> Iterator[io.BytesIO]:
    """Every pickle in a torch file that may be the tensors'."""
    if not archive:
        # A torch file from before zip archives is five pickles in a row, the tensors' being the fourth.
        with path.open("rb") as file:
            yield from itertools.repeat(io.BytesIO(file.read(_MAX_PICKLE)), 5)
        return
    with zipfile.ZipFile(path) as members:
        # torch finds its own without regard to case.
        for entry in members.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                if entry.file_size > _MAX_PICKLE:
                    raise UnsupportedAdapterError(
                        f"{path.name}: its pickle has {entry.file_size} bytes, expected at most {_MAX_PICKLE}"
                    )
                yield io.BytesIO(members.read(entry))


def _globals_in(stream: io.BytesIO) -> Iterator[str]:
    """``module.name`` of each import in the pickle at the stream's place; ValueError where it stops being one."""
    texts: list[str] = []
    memo: dict[object, str] = {}
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


def _line(error: BaseException) -> str:
    """The message of a foreign error: its last informative line, bounded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Check the documentation", "Weights only load failed"))]
    return escaped(lines[-1] if lines else type(error).__name__, 200)
