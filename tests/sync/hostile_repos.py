"""Repositories and folders as somebody would make them who wants to harm the machine that reads them."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
PREFIX = "base_model.model.model.layers.0.self_attn"


@dataclass(frozen=True)
class Hostile:
    """One of them.

    Args:
        make (Callable[[Path], None]): makes it of the folder of a good adapter.
        outcome (str): what sync is to say.
        says (str): regular expression found in the reason, or in a note where the adapter is used.
    """

    make: Callable[[Path], None]
    outcome: str
    says: str


class Call:
    """Pickles as a call: loading it with ``pickle`` makes the call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def configured(**fields: Any) -> Callable[[Path], None]:
    """A config with other fields."""

    def make(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return make


def raw_config(field: str, text: str) -> Callable[[Path], None]:
    """A config with a field that ``json.dumps`` would not write, after all others."""

    def make(folder: Path) -> None:
        (folder / CONFIG).write_text((folder / CONFIG).read_text().rstrip("}") + f', "{field}": {text}}}')

    return make


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    """A file with other bytes."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file of that many bytes, all of them zero."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, size)

    return make


def pickled(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Weights that are a pickle and nothing else."""

    def replace(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        make(folder / PICKLE)

    return replace


def torch_archive(content: object, name: str = "archive/data.pkl") -> Callable[[Path], None]:
    """A file of torch's form with any pickle in it."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, pickle.dumps(content, protocol=2))
            archive.writestr("archive/version", "3\n")

    return make


def safetensors(entries: Mapping[str, tuple[str, list[int], bytes]], length: int | None = None) -> bytes:
    """A safetensors file of ``name: (dtype, shape, bytes)``, with a true or another length of its header."""
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def factors(module: str = f"{PREFIX}.q_proj") -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}


def _scattered(folder: Path, roles: str, value: bytes) -> None:
    """Modules of every other layer, which no range of numbers names in few words."""
    entries = {
        f"base_model.model.m.layers.{2 * number}.q.lora_{role}.weight": ("F32", [1, 1], value)
        for number in range(5_000)
        for role in roles
    }
    whole = {f"{PREFIX}.q.lora_{role}.weight": ("F32", [1, 1], b"\0\0\x80?") for role in "AB"}
    (folder / WEIGHTS).write_bytes(safetensors(entries | whole))


def _zip_bomb(path: Path) -> None:
    torch.save(factors() | {"zeros": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as stored:
        entries = {entry.filename: stored.read(entry) for entry in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)


def _unfilled(path: Path) -> None:
    """A torch file from before zip archives, of two elements that it says are 2^30, and which it never fills."""
    stream = io.BytesIO()
    torch.save({f"{PREFIX}.q_proj.lora_A.weight": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    claim = content.replace(b"K\x02Nt", b"J\x00\x00\x00\x40Nt").replace(b"K\x02\x85", b"J\x00\x00\x00\x40\x85")
    path.write_bytes(claim[: claim.rindex(b"\x80\x02]")] + pickle.dumps([], protocol=2))


def _tar(path: Path) -> None:
    """A torch file of before 2017, which torch would unpack."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"\x80\x02K\x00"))


def _disguised(path: Path) -> None:
    """An ordered dictionary with an ``items`` of its own, which a pickle may give it."""
    stored, stream = collections.OrderedDict(factors()), io.BytesIO()
    stored.__dict__["itemz"] = "none"
    torch.save(stored, stream, _use_new_zipfile_serialization=False)
    path.write_bytes(stream.getvalue().replace(b"itemz", b"items"))


def _named(name: str) -> bytes:
    return safetensors({f"{name}.lora_A.weight": ("F32", [1, 1], b"\0\0\x80?"), "b": ("F32", [1, 1], b"\0\0\x80?")})


def _card(front: str) -> bytes:
    return f"---\nlicense: mit\n{front}\n---\nProse.\n".encode()


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(20)
)
ESCAPES = "\x1b[2J\x07\x9b31m\u202e"

REPOS: dict[str, Hostile] = {
    # Sizes.
    "header-of-2-60-bytes": Hostile(
        holding(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}      "), "unsupported", "no usable safetensors file"
    ),
    "header-of-2-63-bytes": Hostile(
        holding(WEIGHTS, struct.pack("<Q", (1 << 64) - 1) + b"{}      "), "unsupported", "no usable safetensors file"
    ),
    "shape-of-2-64-elements": Hostile(
        holding(WEIGHTS, safetensors({"a": ("F32", [1 << 32, 1 << 32], b"1234")})), "unsupported", "no usable safetens"
    ),
    "readme-of-100-mb": Hostile(sparse(CARD, 100_000_000), "added", r"README.md ignored: 100000000 bytes, at most"),
    "config-of-50-mb": Hostile(sparse(CONFIG, 50_000_000), "unsupported", "has 50000000 bytes, expected at most"),
    "dimensions": Hostile(
        holding(WEIGHTS, safetensors({"a": ("F32", [1] * 5000, b"1234")})), "unsupported", "has 5000 dimensions"
    ),
    "samples-of-nothing": Hostile(
        holding("samples.jsonl", b"1\n" * 1_000_000), "added", "10000 lines of samples.jsonl left out .* not read$"
    ),
    # Cards.
    "yaml-bomb": Hostile(holding(CARD, _card(BOMB)), "added", "card metadata ignored: it uses YAML aliases"),
    "yaml-nested": Hostile(holding(CARD, _card("a: " + "[" * 9000)), "added", "nested more than 20 deep"),
    "yaml-code": Hostile(
        holding(CARD, _card("a: !!python/object/apply:os.system ['true']")), "added", "could not determine a construct"
    ),
    "yaml-number": Hostile(
        holding(CARD, _card("tags: " + "1:" * 300 + "1.0")), "added", "card metadata ignored: int too"
    ),
    "yaml-empty-number": Hostile(
        holding(CARD, _card("tags: !!int ''")), "added", "card metadata ignored: string index"
    ),
    "yaml-truth": Hostile(holding(CARD, _card("tags: !!bool maybe")), "added", "card metadata ignored: 'maybe'"),
    "yaml-tag": Hostile(holding(CARD, _card("tags: !!" + "x" * 40_000)), "added", "could not determine a constructor"),
    "headings": Hostile(holding(CARD, b"## a\n" * 150_000), "added", ""),
    "comments": Hostile(holding(CARD, b"<!--" * 200_000), "added", ""),
    "no-utf-8": Hostile(holding(CARD, b"---\nlicense: mit\ntags: [\xff\xfe]\n---\n\xc3\x28\xed\xa0\x80"), "added", ""),
    "steering-card": Hostile(
        holding(CARD, _card(f'tags: ["{json.dumps(ESCAPES)[1:-1]}", "a\\nb"]') + ESCAPES.encode()), "added", ""
    ),
    "samples-no-utf-8": Hostile(
        holding("samples.jsonl", b'\xff\n{"input": "\\ud800"}\n' + b"[" * 5000),
        "added",
        "3 lines of samples.jsonl left out",
    ),
    # Configs.
    "rank-of-10-30": Hostile(configured(r=10**30), "unsupported", "r is 1000.*, expected a whole number from 1"),
    "rank-of-5000-digits": Hostile(
        raw_config("r", "9" * 5000), "unsupported", "adapter_config.json is not JSON: Exceeds"
    ),
    "negative-rank": Hostile(configured(r=-8), "unsupported", "r is -8, expected a whole number"),
    "fractional-rank": Hostile(configured(r=2.5), "unsupported", "r is 2.5, expected a whole number"),
    "negative-alpha": Hostile(configured(lora_alpha=-4), "added", ""),
    "huge-alpha": Hostile(configured(lora_alpha=1e300), "unsupported", "lora_alpha is 1e.300, expected a number from"),
    "infinite-alpha": Hostile(raw_config("lora_alpha", "Infinity"), "unsupported", "lora_alpha is Infinity, expected"),
    "overflowing-alpha": Hostile(raw_config("lora_alpha", "1e999"), "unsupported", "lora_alpha is Infinity, expected"),
    "alpha-of-no-number": Hostile(raw_config("lora_alpha", "NaN"), "unsupported", "lora_alpha is NaN, expected"),
    "alpha-of-zero": Hostile(
        configured(lora_alpha=0), "unsupported", "the scaling of B A is zero in all of its 2 modules"
    ),
    "repeated-keys": Hostile(raw_config("r", '3, "r": 2'), "added", ""),
    "nested-990-deep": Hostile(raw_config("r", "[" * 990 + "]" * 990), "unsupported", "r is |not JSON"),
    "nested-100000-deep": Hostile(raw_config("r", "[" * 100_000), "unsupported", "adapter_config.json is not JSON"),
    "config-no-utf-8": Hostile(holding(CONFIG, b'{"peft_type": "\xff"}'), "unsupported", "not JSON: 'utf-8' codec"),
    "config-of-a-link": Hostile(holding(CONFIG, b"../../../../etc/passwd"), "unsupported", "is not JSON"),
    "many-targets": Hostile(
        configured(target_modules=[f"q{n}" for n in range(90_000)]), "added", "names q0, q1, q2, and 89997 more, for"
    ),
    "too-many-saved": Hostile(
        configured(modules_to_save=["x"] * 1001), "unsupported", "expected a list of names, at most 1000"
    ),
    "steering-names": Hostile(
        configured(base_model_name_or_path=f"a\nb{ESCAPES}\0\ud800", target_modules=[f"a\nb{ESCAPES}\ud800"]),
        "added",
        "",
    ),
    "repetitions": Hostile(
        configured(rank_pattern={"(?:" * 18 + "a" + "){1,9}" * 18: 2}), "unsupported", "repetitions come to more than"
    ),
    "recursion": Hostile(configured(rank_pattern={"(?R)": 2}), "unsupported", r"no syntax of Python's re"),
    "slow-pattern": Hostile(
        configured(target_modules="(?:" * 18 + "a" + "){1,9}" * 18), "added", "faulty or too slow, not compared"
    ),
    # Weights.
    "faults-by-the-thousand": Hostile(
        lambda folder: _scattered(folder, "A", b"1234"), "unsupported", "m.layers.{0,2,4,"
    ),
    "zeros-by-the-thousand": Hostile(
        lambda folder: _scattered(folder, "AB", b"\0\0\0\0"), "added", "no direction: m.la"
    ),
    "steering-tensors": Hostile(
        holding(WEIGHTS, _named(f"{PREFIX}.{ESCAPES}")), "unsupported", "is too long or not printable"
    ),
    "pickle-of-torch": Hostile(
        pickled(torch_archive({"a": Call(bytearray, 10**9)})), "unsupported", "asks for __builtin__.bytearray: not load"
    ),
    "memory-of-others": Hostile(
        pickled(torch_archive({"a": Call(torch.Tensor, 2, 8)})), "unsupported", "asks for torch.Tensor: not loaded"
    ),
    "upper-case": Hostile(
        pickled(torch_archive({"a": Call(torch.FloatTensor, 2)}, "archive/DATA.PKL")), "unsupported", "FloatTensor: not"
    ),
    "disguised": Hostile(pickled(_disguised), "added", ""),
    "zip-bomb": Hostile(pickled(_zip_bomb), "unsupported", "expected no compression"),
    "legacy": Hostile(
        pickled(lambda path: torch.save(factors(), path, _use_new_zipfile_serialization=False)), "added", ""
    ),
    "legacy-unfilled": Hostile(pickled(_unfilled), "unsupported", "bytes, but its tensors claim 4294967296"),
    "legacy-tar": Hostile(pickled(_tar), "unsupported", "no usable torch file"),
}
