from __future__ import annotations

import collections
import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import write_adapter
from safetensors.torch import save_file

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.reader import read_folder
from hub_router.lora.weights import find_weights, hash_weights, load_tensors


class Wants:
    """Unpickling this would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def reason(path: Path) -> str:
    with pytest.raises(UnsupportedAdapterError) as refusal:
        load_tensors(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_that_asks_for_more_is_refused_by_name_and_not_executed(
    tmp_path: Path, form: str, protocol: int
) -> None:
    file, marker = tmp_path / "adapter_model.bin", tmp_path / "executed"
    content = {"a": torch.zeros(2), "b": Wants(marker)}
    if form == "bare":
        file.write_bytes(pickle.dumps({"b": Wants(marker)}, protocol=protocol))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    assert f"asks for {os.name}.system: not loaded" in reason(file)
    assert not marker.exists()
    if form == "bare":
        pickle.loads(file.read_bytes())
        assert marker.exists(), "the file does what the test says"


def test_a_whole_model_names_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "adapter_model.bin")
    assert "torch.nn.modules.linear.Linear" in reason(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"a": 1, "b": torch.zeros(2)}, "'a': int"),
        ({1: torch.zeros(2)}, "1 entries are no named tensors"),
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict': dict"),
        ({}, "holds no tensors"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "dtype int64"),
        ({"a": torch.eye(2).to_sparse()}, "expected a dense one"),
        ({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, "stores fewer elements"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "adapter_model.bin")
    assert expected in reason(tmp_path / "adapter_model.bin")


def test_ordered_dictionaries_and_parameters_are_tensors_too(tmp_path: Path) -> None:
    stored = collections.OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=torch.zeros(3, dtype=torch.bfloat16))
    torch.save(stored, tmp_path / "adapter_model.bin")
    loaded = load_tensors(tmp_path / "adapter_model.bin")
    assert list(loaded) == ["a", "b"]
    assert not loaded["a"].requires_grad
    assert torch.equal(loaded["a"], torch.ones(2))


def test_an_archive_that_unpacks_to_more_than_its_size(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert "expected no compression" in reason(file)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"\x00\x00", "a file of only 2 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:6d1b\nsize 700\n", "a Git LFS pointer"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "AppleDouble"),
        (b"<html><body>404</body></html>", "an HTML page"),
        (b"\x1f\x8b\x08\x00rest", "a gzip archive"),
        (b"garbage that is nothing at all" * 10, "no usable"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no usable"),
        (b"PK\x03\x04 half an archive", "no usable"),
        (pickle.dumps("text")[:-1], "no usable"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in reason(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for safe in (True, False):
        (file,) = find_weights(write_adapter(tmp_path / str(safe), safe=safe), "LORA")
        file.write_bytes(file.read_bytes()[:-20])
        assert "no usable" in reason(file)


def test_integer_tensors_in_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "adapter_model.safetensors")
    assert "'a' has dtype int8, expected one of float32" in reason(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("shift", range(8))
def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path: Path, shift: int) -> None:
    """Of any shape, and wherever in the file the data begin: headers end on a multiple of 8 by custom alone."""
    generator = torch.Generator().manual_seed(shift)
    shapes: list[tuple[int, ...]] = [(), (5,), (3, 4), (2, 3, 1), (1, 1)]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    stored = {
        f"{dtype} {shape}": torch.randn(shape, generator=generator).to(dtype) for shape in shapes for dtype in dtypes
    }
    file = tmp_path / "adapter_model.safetensors"
    save_file(stored, file)
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = content[8:end].rstrip() + b" " * (8 + shift)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[end:])
    read = load_tensors(file)
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].is_contiguous()
        assert torch.equal(read[name], tensor)


def test_folders_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"expected adapter_model\.safetensors or adapter_model\.bin$"):
        find_weights(tmp_path, "LORA")
    (tmp_path / "adapter_model.safetensors").mkdir()
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(UnsupportedAdapterError, match=r"found a full model \(model.safetensors.index.json\), itself"):
        find_weights(tmp_path, "LORA")


def test_hash_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(b"weights" * 300_000)
    assert hash_weights([file], '{"r":1}') == hashlib.sha256(file.read_bytes() + b'{"r":1}').hexdigest()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_to_a_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    (file,) = find_weights(write_adapter(folder, safe=data.draw(st.booleans())), "LORA")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        adapter, _ = read_folder(folder, "damaged")
    except UnsupportedAdapterError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(f.A).all() and torch.isfinite(f.B).all() for f in adapter.modules.values())


@given(
    entries=st.dictionaries(
        st.text(max_size=12),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "X"]),
                "shape": st.lists(st.integers(0, 1 << 40) | st.integers(0, 3), max_size=3),
                "data_offsets": st.lists(st.integers(0, 1 << 62) | st.integers(0, 64), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_safetensors_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("header"))
    header = json.dumps(entries).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 64)
    with pytest.raises(UnsupportedAdapterError):
        read_folder(folder, "header")
