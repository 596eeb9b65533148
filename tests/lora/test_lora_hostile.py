"""Folders made to exhaust time or memory, to get at something that is not theirs, or to be taken for an adapter."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import PLAIN, PREFIX, factors, peft_adapter, tiny_llama, write_adapter
from safetensors.torch import save_file

from hub_router import compose
from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.adapter import LoraFactors
from hub_router.lora.facts import inspect
from hub_router.lora.patterns import MAX_PARTS, PatternValue, first_values, unmatched
from hub_router.lora.reader import read_adapter, read_folder
from hub_router.lora.spectrum import spectrum
from hub_router.lora.weights import MAX_TENSORS, load_tensors

MODULE = "model.layers.0.self_attn.q_proj"


class Call:
    """Pickles as a call: loading it makes the call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedAdapterError) as caught:
        inspect(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000
    return str(caught.value)


def header_only(folder: Path, tensors: int) -> Path:
    """An adapter of that many tensors of one element each."""
    header = {
        f"{PREFIX}l.{number // 2}.q.lora_{'AB'[number % 2]}.weight": {
            "dtype": "F32",
            "shape": [1, 1],
            "data_offsets": [4 * number, 4 * number + 4],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"\0\0\x80?" * tensors
    (write_adapter(folder) / "adapter_model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize("base", [PLAIN, {"fine_tune_type": "lora", "lora_parameters": {"scale": 1}}])
@pytest.mark.parametrize(
    "field", ["r", "target_modules", "rank_pattern", "init_lora_weights", "fine_tune_type", "model"]
)
def test_config_nested_as_deep_as_can_just_be_parsed(tmp_path: Path, base: Mapping[str, Any], field: str) -> None:
    folder = write_adapter(tmp_path)
    for depth in range(940, 1010):
        text = json.dumps({**base, field: "here"}).replace('"here"', "[" * depth + "]" * depth)
        (folder / "adapter_config.json").write_text(text)
        try:
            read_folder(folder, "deep")
        except UnsupportedAdapterError as error:
            assert len(str(error)) < 300


@pytest.mark.parametrize(
    "pattern",
    [
        "(?R)",
        "(?P<x>(?&x))",
        "(?:q_proj){e<=3}",
        "(?e)q",
        "(?x) q # )",
        r"\p{L}+",
        "[[:alpha:]]+",
        "(?|q|k)",
        "(*FAIL)",
        r"\R",
        "(?#x)q",
    ],
)
def test_pattern_that_python_would_read_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"cannot be matched: no syntax of Python's re at position"):
        first_values([PatternValue(pattern, 1)], [MODULE], "rank_pattern")
    assert unmatched(pattern, [MODULE]) is None


@pytest.mark.parametrize(
    "pattern",
    ["(?:" * 17 + "a" + "){1,9}" * 17, "(?:" * 17 + "[a)]" + ")+" * 17, "((a{60}){60}){60}", "(a{00000000300}){300}"],
)
def test_pattern_that_would_be_written_out_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"its repetitions come to more than {MAX_PARTS} parts"):
        first_values([PatternValue(pattern, 1)], [MODULE], "rank_pattern")
    assert unmatched(pattern, [MODULE]) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:q))",
        r"model\.layers\.\d+\.self_attn\.(q|k)_proj",
        r"^(?!.*visual)(?P<stem>.*)(?:q|k)_proj$",
        r"(?i:MODEL).*[]\w)(]+",
        r".*[\\p]roj",
        r"\{x\}|.*(?<=q)_pro{0,2}j",
        "a)|(model.*",
        "[^.]+(?:[.][^.]{1,12}){1,9}",
    ],
)
def test_usual_patterns_match_as_python_matches(pattern: str) -> None:
    names = [MODULE, "model.visual.q_proj", "q_proj", "{x}", "a"]
    whole = rf"(.*\.)?({pattern})$"
    found = first_values([PatternValue(pattern, 1)], names, "rank_pattern")
    assert list(found) == [name for name in names if re.match(whole, name)]
    if ")|(" not in pattern:
        assert unmatched(pattern, names) == tuple(name for name in names if not re.fullmatch(pattern, name))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "field",
    [
        {"layers_to_transform": list(range(120_000))},
        {"exclude_modules": [f"e{number}" for number in range(90_000)]},
        {"exclude_modules": ".*"},
        {"target_modules": [f"t{number}" for number in range(90_000)]},
        {"modules_to_save": [f"s{number}" for number in range(1_000)]},
        {"rank_pattern": {f"p{number}": 2 for number in range(10_000)}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_long_lists_cost_no_more_than_they_are_long(tmp_path: Path, field: dict[str, Any]) -> None:
    folder = header_only(tmp_path, 20_000)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | field))
    began = time.monotonic()
    try:
        notes = read_folder(folder, "long")[0].notes
        assert all(len(note) < 500 for note in notes)
    except UnsupportedAdapterError as error:
        assert "takes longer than 2 seconds" in str(error)
    assert time.monotonic() - began < 20


@pytest.mark.timeout(120)
def test_number_of_tensors(tmp_path: Path) -> None:
    assert len(inspect(header_only(tmp_path / "many", 100_000)).modules) == 50_000
    said = refusal(header_only(tmp_path / "too-many", MAX_TENSORS + 2))
    assert said == f"adapter_model.safetensors holds {MAX_TENSORS + 2} tensors, expected at most {MAX_TENSORS}"


def test_number_of_dimensions(tmp_path: Path) -> None:
    for name, save in (("adapter_model.safetensors", save_file), ("adapter_model.bin", torch.save)):
        folder = write_adapter(tmp_path / name, safe=False)
        save({"a": torch.ones(*[1] * 300)}, folder / name)
        assert "'a' has 300 dimensions, expected at most 8" in refusal(folder)


def test_scaling_of_zero_would_serve_the_base_model(tmp_path: Path) -> None:
    assert refusal(write_adapter(tmp_path / "zero", None, PLAIN | {"lora_alpha": 0})) == (
        "the scaling of B A is zero in all of its 1 modules, so the adapter changes nothing"
    )
    tensors = factors("layers.0.q") | factors("layers.1.q")
    partly = write_adapter(tmp_path / "partly", tensors, PLAIN | {"alpha_pattern": {"layers.0.q": 0}})
    assert "1 of 2 modules have an all-zero B A, no direction: layers.0.q" in inspect(partly).notes


def archive(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path


def dumped(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def tensor_with_own_method() -> bytes:
    """A tensor whose ``numel`` is a number, which ``torch.load`` allows."""
    tensor = torch.ones(2)
    tensor.numel_ = 3  # type: ignore[attr-defined]
    stream = io.BytesIO()
    torch.save({"a": tensor}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(b"numel_", b"detach")


def dictionary_with_own_method() -> bytes:
    stored, stream = collections.OrderedDict(factors()), io.BytesIO()
    stored.__dict__["itemz"] = 3
    torch.save(stored, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(b"itemz", b"items")


def unfilled() -> bytes:
    """A torch file from before zip archives that says two elements are 2^30 and names no storage to be filled."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    content = (
        stream.getvalue().replace(b"K\x02Nt", b"J\x00\x00\x00\x40Nt").replace(b"K\x02\x85", b"J\x00\x00\x00\x40\x85")
    )
    return content[: content.rindex(b"\x80\x02]")] + dumped([])


PICKLES: dict[str, tuple[Callable[[], bytes | Mapping[str, bytes]], str]] = {
    "memory": (lambda: {"a/data.pkl": dumped({"a": Call(bytearray, 10**9)})}, "asks for __builtin__.bytearray: not"),
    "tensor": (lambda: {"a/data.pkl": dumped({"a": Call(torch.Tensor, 2, 5)})}, "asks for torch.Tensor: not loaded"),
    "typed": (lambda: {"a/data.pkl": dumped({"a": Call(torch.FloatTensor, 2)})}, "asks for torch.FloatTensor: not"),
    "storage": (lambda: {"a/data.pkl": dumped({"a": Call(torch.UntypedStorage, 9)})}, "torch.storage.UntypedStorage: "),
    "case": (lambda: {"a/DATA.PKL": dumped({"a": Call(torch.Tensor, 2)})}, "asks for torch.Tensor: not loaded"),
    "second": (
        lambda: {"a/x/data.pkl": dumped({}), "a/data.pkl": dumped({"a": Call(torch.Tensor, 2)})},
        "asks for torch.Tensor: not loaded",
    ),
    "long": (lambda: {"a/data.pkl": bytes((1 << 24) + 1)}, "its pickle has 16777217 bytes, expected at most 16777216"),
    "broken": (lambda: {"a/data.pkl": dumped({"a": Call(os.getcwd)})[:-4]}, f"asks for {os.name}.getcwd: not loaded"),
    "name": (lambda: b"\x80\x02cos\nsy\x1b[2Jstem\n.", r"asks for os.sy\x1b[2Jstem: not loaded"),
    "tensor's method": (tensor_with_own_method, "torch._tensor._rebuild_from_type_v2: not loaded"),
    "unfilled": (unfilled, "bytes, but its tensors claim 4294967296"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_that_makes_what_it_does_not_hold_is_refused(tmp_path: Path, name: str) -> None:
    make, expected = PICKLES[name]
    content, file = make(), write_adapter(tmp_path, safe=False) / "adapter_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        archive(file, content)
    assert expected in refusal(tmp_path)


def test_dictionary_is_read_by_its_entries_not_by_its_own_methods(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(dictionary_with_own_method())
    assert list(load_tensors(file)) == list(factors())


def test_archive_whose_entries_overlap(tmp_path: Path) -> None:
    file = write_adapter(tmp_path, safe=False) / "adapter_model.bin"
    # One record of a megabyte, listed 50 times: a small archive that unpacks to 50 megabytes.
    archive(file, {"a/data.pkl": dumped({}), "a/data/0": bytes(1 << 20)})
    content = bytearray(file.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entry = content[directory:end]
    content[end:end] = bytes(entry) * 49
    end += len(entry) * 49
    struct.pack_into("<HHI", content, end + 8, 51, 51, end - content.index(b"PK\x01\x02"))
    file.write_bytes(content)
    assert "expected no compression" in refusal(tmp_path)


def test_rank_far_above_the_widths_needs_no_memory_of_its_square() -> None:
    generator = torch.Generator().manual_seed(0)
    each = LoraFactors(torch.randn(4000, 2, generator=generator), torch.randn(3, 4000, generator=generator), 0.5)
    tracemalloc.start()
    found = spectrum("m", each)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    expected = torch.linalg.svdvals(0.5 * each.B.double() @ each.A.double())
    assert torch.allclose(torch.from_numpy(found.singular_values[:2]).double(), expected[:2], rtol=1e-5)
    assert not found.singular_values[2:].any()


def memory_of(kind: str) -> int:
    """Bytes of this process, as Linux counts them: ``Anonymous`` is what no file backs, ``Rss`` all that is there."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(rf"^{kind}:\s+(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured as Linux states it")
@pytest.mark.parametrize(("suffix", "rows"), [("safetensors", 30_000), ("bin", 12_000)])
def test_weights_stay_in_their_file(tmp_path: Path, suffix: str, rows: int) -> None:
    folder, name = write_adapter(tmp_path, safe=False), f"{PREFIX}layers.0.q.lora_{{}}.weight"
    size = 4 * rows * 2500
    if suffix == "safetensors":
        header = {
            name.format("B"): {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]},
            name.format("A"): {"dtype": "F32", "shape": [1, rows * 2500], "data_offsets": [16, 16 + size]},
        }
        text = json.dumps(header).encode()
        file = folder / "adapter_model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0\x80?" * 8)
        os.truncate(file, 8 + len(text) + 16 + size)
    else:
        file = folder / "adapter_model.bin"
        torch.save({name.format("B"): torch.ones(4, 1), name.format("A"): torch.ones(1, rows * 2500)}, file)
    inspect(write_adapter(tmp_path / "first"))
    before = {kind: memory_of(kind) for kind in ("Rss", "Anonymous")}
    tensors = load_tensors(file)
    assert memory_of("Rss") - before["Rss"] < size / 10, "nothing is read before it is used"
    adapter = read_adapter(folder)
    assert adapter.modules["layers.0.q"].A.numel() == rows * 2500
    assert memory_of("Anonymous") - before["Anonymous"] < size / 10, "what is read is not copied"
    del tensors


COMPOSED: dict[str, Callable[[Path], Any]] = {
    "config of 50 MB": lambda folder: os.truncate(folder / "adapter_config.json", 50_000_000),
    "header of 2^60 bytes": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", 1 << 60) + b"{}      "
    ),
    "pickle": lambda folder: (
        (folder / "adapter_model.safetensors").unlink(),
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Call(os.system, "touch executed"))),
    ),
    "rank": lambda folder: (folder / "adapter_config.json").write_text(json.dumps(PLAIN | {"r": 10**30})),
    "pipe": lambda folder: ((folder / "adapter_config.json").unlink(), os.mkfifo(folder / "adapter_config.json")),
    "folder": lambda folder: (
        (folder / "adapter_model.safetensors").unlink(),
        (folder / "adapter_model.safetensors").mkdir(),
    ),
    "loop": lambda folder: (
        (folder / "adapter_model.safetensors").unlink(),
        (folder / "adapter_model.safetensors").symlink_to("adapter_model.safetensors"),
    ),
    "elsewhere": lambda folder: (
        (folder / "adapter_config.json").unlink(),
        (folder / "adapter_config.json").symlink_to("/etc/passwd"),
    ),
    "nan": lambda folder: save_file(
        {name: t / 0 for name, t in factors().items()}, folder / "adapter_model.safetensors"
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders there")
@pytest.mark.parametrize("name", COMPOSED)
def test_hostile_folder_is_one_error_and_the_model_stays_as_it_was(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peft_adapter(tmp_path / "good")
    evil = write_adapter(tmp_path / "evil")
    COMPOSED[name](evil)
    model = tiny_llama()
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(UnsupportedAdapterError) as caught:
        compose(model, {"good": tmp_path / "good", "evil": evil}, "uniform")
    assert str(caught.value).startswith(f"adapter 'evil' ({evil}): ")
    assert str(caught.value).isprintable()
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in modules.values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "executed").exists()
