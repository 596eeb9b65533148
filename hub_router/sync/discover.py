"""Which folders of a file tree are adapters, and which of their files are needed.

Works on paths and sizes alone, so it serves a repository's listing and a local folder alike. Only files that the
catalog reads are named: never ``training_args.bin``, optimiser states or the weights of a full model that lies beside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hub_router.formats import MLX_FILE, describe_names
from hub_router.sync.card import CARD_BYTES
from hub_router.sync.samples import SAMPLE_FILE_BYTES, SPLITS
from hub_router.sync.targets import is_safe_path

CONFIG = "adapter_config.json"
CONFIG_BYTES = 1_000_000
# Which of several folders checkpoint-N to take.
NEWEST, ALL = "newest", "all"
CARD = "README.md"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NAMED = 10


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter in a file tree.

    Args:
        subfolder (str): its folder, empty for the top.
        files (tuple[str, ...]): paths needed, from the top of the tree; cards of parent folders included.
        problem (str): why it cannot be used, known from names and sizes alone; empty if it may be usable.
        notes (tuple[str, ...]): files left out, and why.
        skipped (str): one line about the checkpoints that this adapter stands for; empty if there are none.
    """

    subfolder: str
    files: tuple[str, ...]
    problem: str = ""
    notes: tuple[str, ...] = ()
    skipped: str = ""


def find_adapters(
    sizes: Mapping[str, int], within: Sequence[str] = ("",), checkpoints: str = NEWEST
) -> list[AdapterFolder]:
    """Adapters of a file tree: its top, its subfolders, and of checkpoints the newest.

    A folder ``checkpoint-N`` counts only where the folder above is no adapter itself, and then only the largest N,
    unless it was asked for by name, or all are asked for.

    Args:
        sizes (Mapping[str, int]): size in bytes by path of every file; unsafe paths are ignored.
        within (Sequence[str]): only adapters in or below these folders; the empty one is the top.
        checkpoints (str): :data:`NEWEST` or :data:`ALL`.

    Returns:
        list[AdapterFolder]: by folder name.
    """
    usable = {path: size for path, size in sizes.items() if is_safe_path(path) and not _is_junk(path)}
    folders: dict[str, dict[str, int]] = {}
    for path, size in usable.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = size
    adapters = {folder for folder, names in folders.items() if CONFIG in names}
    chosen: set[str] = set()
    for top in within:
        below = {folder for folder in adapters if is_within(folder, top)}
        chosen |= below if checkpoints == ALL else _without_old_checkpoints(below, top)
    skipped: dict[str, list[str]] = {}
    for folder in (folder for folder in adapters - chosen if any(is_within(folder, top) for top in within)):
        parent, checkpoint = _checkpoint(folder) or ("", folder)
        skipped.setdefault(parent, []).append(checkpoint)
    return [
        replace(_folder(folder, folders), skipped=_skipped(skipped.get(_place(folder, adapters), ())))
        for folder in sorted(chosen)
    ]


def is_within(folder: str, top: str) -> bool:
    """Whether a folder is another one or lies below it; the empty one is the top of the tree."""
    return not top or folder == top or folder.startswith(f"{top}/")


def unsafe_paths(sizes: Mapping[str, int]) -> list[str]:
    """Paths that would leave the folder they are relative to, or that cannot be kept in it."""
    return [path for path in sizes if not is_safe_path(path)]


def _is_junk(path: str) -> bool:
    """Hidden files and the shadow files that macOS archives carry."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _checkpoint(folder: str) -> tuple[str, str] | None:
    """The folder above the first ``checkpoint-N`` on the way to an adapter, and that checkpoint's own path."""
    parts = folder.split("/")
    depth = next((depth for depth, part in enumerate(parts) if _CHECKPOINT.fullmatch(part)), None)
    return None if depth is None else ("/".join(parts[:depth]), "/".join(parts[: depth + 1]))


def _place(folder: str, adapters: set[str]) -> str:
    """The folder whose skipped checkpoints an adapter stands for: its own, or the one above it as a checkpoint."""
    found = _checkpoint(folder)
    return found[0] if found and found[0] not in adapters else folder


def _skipped(checkpoints: Sequence[str]) -> str:
    if not checkpoints:
        return ""
    names = sorted(set(checkpoints), key=lambda path: (len(path), path))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"older checkpoints skipped: {', '.join(names[:_NAMED])}{more}; name one to sync it, or ask for all checkpoints"
    )


def _without_old_checkpoints(adapters: set[str], top: str) -> set[str]:
    newest: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    for folder in adapters:
        parts = folder.split("/")
        for depth in range(len(top.split("/")) if top else 0, len(parts)):
            if match := _CHECKPOINT.fullmatch(parts[depth]):
                parent, step = "/".join(parts[:depth]), int(match[1])
                places[folder] = (parent, step)
                newest[parent] = max(step, newest.get(parent, step))
                break
    kept = adapters - places.keys()
    return kept | {
        folder for folder, (parent, step) in places.items() if parent not in adapters and step == newest[parent]
    }


def _folder(folder: str, folders: Mapping[str, Mapping[str, int]]) -> AdapterFolder:
    names = folders[folder]
    if names[CONFIG] > CONFIG_BYTES:
        problem = f"{CONFIG} has {names[CONFIG]} bytes, expected at most {CONFIG_BYTES}"
        return AdapterFolder(folder, (), problem)
    weights = _weights(names)
    if not weights:
        found = describe_names(names)
        problem = f"no adapter_model.safetensors or adapter_model.bin beside {CONFIG}"
        index = next((name for name in sorted(names) if re.fullmatch(r"adapter_model\.\w+\.index\.json", name)), None)
        if index:
            problem += f", and {index} without its shards adapter_model-00001-of-N"
        elif found:
            problem += f", found {found}"
        return AdapterFolder(folder, (), problem)
    files = [_join(folder, name) for name in (CONFIG, *weights)]
    notes: list[str] = []
    parents = folder.split("/") if folder else []
    cards = [("/".join(parents[:depth]), CARD, CARD_BYTES) for depth in range(len(parents), -1, -1)]
    for place, name, limit in [*cards, *((folder, name, SAMPLE_FILE_BYTES) for name in SPLITS)]:
        size = folders.get(place, {}).get(name)
        if size is None:
            continue
        if size > limit:
            notes.append(f"{_join(place, name)} ignored: {size} bytes, at most {limit} are read")
        else:
            files.append(_join(place, name))
    return AdapterFolder(folder, tuple(files), "", tuple(notes))


def _weights(names: Mapping[str, int]) -> list[str]:
    """The weight files to use: safetensors before pickles, one file before shards; MLX-LM's where there are some."""
    # Only the config, which is not read here, says whose weights count.
    mlx = [MLX_FILE] if MLX_FILE in names else []
    for suffix in ("safetensors", "bin"):
        whole, index = f"adapter_model.{suffix}", f"adapter_model.{suffix}.index.json"
        if whole in names:
            return [whole, *mlx]
        shards = [name for name in sorted(names) if re.fullmatch(rf"adapter_model-\d+-of-\d+\.{suffix}", name)]
        if index in names and shards:
            return [index, *shards, *mlx]
    return mlx


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
