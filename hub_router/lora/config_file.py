"""Reads ``adapter_config.json``, of bounded size, and hands it to the format that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE
from hub_router.lora.config import AdapterConfig
from hub_router.lora.fields import wrong
from hub_router.lora.formats import describe_file, describe_folder
from hub_router.lora.mlx_config import is_mlx, mlx_config
from hub_router.lora.peft_config import peft_config

MAX_CONFIG_BYTES = 1_000_000


def read_config(folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        folder (Path): folder of the adapter.

    Returns:
        AdapterConfig: the fields that decide the function.

    Raises:
        UnsupportedAdapterError: no such file, not JSON, no LoRA of PEFT or MLX-LM, or a field that cannot be used.
    """
    fields = read_fields(folder)
    return mlx_config(fields) if is_mlx(fields) else peft_config(fields)


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of ``adapter_config.json``, unchecked.

    Args:
        folder (Path): folder of the adapter.

    Returns:
        dict[str, Any]: a JSON object.

    Raises:
        UnsupportedAdapterError: no such file, one that is too large, or no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = describe_folder(folder) if folder.is_dir() else None
        raise UnsupportedAdapterError(f"no {CONFIG_FILE}" + (f", found {found}" if found else f" in {folder.name}"))
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} has {size} bytes, expected at most {MAX_CONFIG_BYTES}")
    what = describe_file(path)
    if what:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} is {what}")
    try:
        fields = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedAdapterError(f"{CONFIG_FILE} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise wrong(CONFIG_FILE, fields, "a JSON object")
    return fields
