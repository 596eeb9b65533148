"""Names what a file or folder is when it is not the PEFT LoRA adapter that it claims to be."""

from __future__ import annotations

from pathlib import Path

from hub_router.formats import name_other

# The length field alone of a safetensors file.
_SHORTEST_WEIGHTS = 8
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer, the file itself was not downloaded"),
    (b"\x00\x05\x16\x07", "macOS AppleDouble metadata, not the file that its name says"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
)


def describe_file(path: Path) -> str | None:
    """What a file is, if its first bytes give it away as something that is neither JSON nor weights.

    Args:
        path (Path): an existing file.

    Returns:
        str | None: e.g. ``an empty file``; None where nothing was recognised.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file"
    if len(head) < _SHORTEST_WEIGHTS and path.suffix != ".json":
        return f"a file of only {len(head)} bytes"
    start = head.lstrip().lower()
    for magic, meaning in _MAGIC:
        if head.startswith(magic) or start.startswith(magic):
            return meaning
    return None


def describe_folder(folder: Path) -> str | None:
    """What a folder holds, judged by its file names, where it holds no complete PEFT adapter.

    Args:
        folder (Path): an existing folder.

    Returns:
        str | None: e.g. ``MLX-LM weights (adapters.safetensors)``, and what that file is where it is damaged; None
        where nothing was recognised.
    """
    found = name_other({entry.name for entry in folder.iterdir() if entry.is_file()})
    if found is None:
        return None
    name, meaning = found
    what = describe_file(folder / name)
    return f"{meaning} ({name}), itself {what}" if what else f"{meaning} ({name})"
