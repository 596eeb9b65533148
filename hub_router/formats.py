"""File names of adapters and of what is taken for one; both halves of the application go by them."""

from __future__ import annotations

from collections.abc import Collection, Container

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"
MLX_FILE = "adapters.safetensors"

_OTHERS = (
    ("pytorch_lora_weights.safetensors", "diffusers LoRA weights"),
    ("pytorch_lora_weights.bin", "diffusers LoRA weights"),
    (MLX_FILE, "MLX-LM weights"),
    ("adapters.npz", "MLX-LM weights of before 2024"),
    ("pytorch_adapter.bin", "AdapterHub weights"),
    ("adapter.safetensors", "AdapterHub weights"),
    ("._adapter_config.json", "only macOS AppleDouble metadata"),
    ("._adapter_model.safetensors", "only macOS AppleDouble metadata"),
    (SAFETENSORS_FILE, "adapter weights"),
    (BIN_FILE, "adapter weights"),
    ("model.safetensors", "a full model"),
    ("model.safetensors.index.json", "a full model"),
    ("pytorch_model.bin", "a full model"),
    ("pytorch_model.bin.index.json", "a full model"),
)


def name_other(names: Container[str]) -> tuple[str, str] | None:
    """The first file that tells what a folder holds, where it holds no complete PEFT adapter.

    Args:
        names (Container[str]): names of its files.

    Returns:
        tuple[str, str] | None: its name and what it is; None where nothing was recognised.
    """
    return next(((name, meaning) for name, meaning in _OTHERS if name in names), None)


def is_foreign_adapter(names: Collection[str]) -> bool:
    """Whether a folder without ``adapter_config.json`` holds an adapter all the same, of another format or incomplete.

    Args:
        names (Collection[str]): names of its files.

    Returns:
        bool: not for a full model, which is no adapter.
    """
    found = None if CONFIG_FILE in names else name_other(names)
    return found is not None and found[1] != "a full model"


def describe_names(names: Container[str]) -> str | None:
    """What a folder holds, judged by its file names alone.

    Args:
        names (Container[str]): names of its files.

    Returns:
        str | None: e.g. ``diffusers LoRA weights (pytorch_lora_weights.safetensors)``.
    """
    found = name_other(names)
    return f"{found[1]} ({found[0]})" if found else None
