"""Whatever a folder holds, reading it gives a usable adapter or one bounded line that says why not, always the same.

Most examples are well-formed but for one or two changes, so that they get past the first checks.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import PLAIN, PREFIX, factors, write_adapter
from safetensors.torch import save_file

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.reader import read_folder
from hub_router.lora.spectrum import spectra
from hub_router.lora.text import SHOWN

LONGEST = 8_000

PLENTY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text(max_size=6) | st.sampled_from(
    ["q", "\x1b[2J", "a\nb", "\ud800", "\0", "x" * 600, "(", "(?R)", "all-linear"]
)
NUMBER = st.integers() | st.floats() | st.sampled_from([0, 1, 2, -1, 10**30, -(10**400), 2**63, 1e-320, 1e308, -0.0])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PATTERNS = st.dictionaries(st.sampled_from(["q", ".*", "layers.0", "(", "[", "(?:", "q{e}", "^x$"]), NUMBER, max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "peft_type": st.sampled_from(["LORA", "ADALORA", "LOHA", "", None]),
    "r": NUMBER,
    "lora_alpha": NUMBER,
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "lora_bias": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only", "x"]),
    "init_r": NUMBER,
    "rank_pattern": PATTERNS,
    "alpha_pattern": PATTERNS,
    "target_modules": st.lists(TEXT, max_size=3) | TEXT,
    "exclude_modules": st.lists(TEXT, max_size=3) | TEXT,
    "layers_to_transform": st.lists(st.integers(), max_size=3) | st.integers(),
    "modules_to_save": st.lists(TEXT, max_size=3),
    "enable_lora": st.lists(st.booleans(), max_size=3),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa"]),
    "auto_mapping": st.dictionaries(st.just("base_model_class"), TEXT),
    "base_model_name_or_path": TEXT,
    "model": TEXT,
    "fine_tune_type": st.sampled_from(["lora", "dora", "full"]),
    "lora_parameters": st.dictionaries(st.sampled_from(["rank", "scale", "alpha", "dropout"]), NUMBER),
    "use_something": st.booleans(),
}
MLX = {"model": "org/base", "fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 4.0}}
BASES: dict[str, dict[str, Any]] = {
    "LORA": dict(PLAIN),
    "ADALORA": {**PLAIN, "peft_type": "ADALORA", "init_r": 4},
    "MLX": MLX,
}


def read(folder: Path) -> str:
    """Read a folder twice: empty if it gave an adapter in which all is as it must be, else the reason."""
    found = [_read(folder) for _ in range(2)]
    assert found[0] == found[1], "reading is deterministic"
    return found[0][0]


def _read(folder: Path) -> tuple[str, str]:
    try:
        adapter, source = read_folder(folder, "any", SHOWN)
    except UnsupportedAdapterError as error:
        text = str(error)
        assert text.isprintable() and 0 < len(text) <= LONGEST, ascii(text[:LONGEST])
        return text, ""
    assert adapter.modules
    assert source.files
    for name, each in adapter.modules.items():
        assert name.isprintable() and name.strip()
        assert each.A.shape == (each.rank, each.d_in) and each.B.shape == (each.d_out, each.rank)
        assert each.rank >= 1 and math.isfinite(each.scaling)
        assert all(torch.isfinite(tensor).all() for tensor in each.tensors.values())
        assert all(tensor.shape == (each.d_out,) for tensor in (each.magnitude, each.bias) if tensor is not None)
    assert all(torch.isfinite(parameter.value).all() for parameter in adapter.saved.values())
    assert all(note.isprintable() and len(note) <= LONGEST for note in adapter.notes), adapter.notes
    for found in spectra(adapter):
        each = adapter.modules[found.module]
        # An update that float32 cannot hold has a spectrum that float32 cannot hold.
        bound = abs(each.scaling) * float(each.A.double().norm()) * float(each.B.double().norm())
        assert np.isfinite(found.singular_values).all() or bound > np.finfo(np.float32).max
        assert found.direction is None or np.isfinite(found.direction).all()
    return "", adapter.weights_hash


def stored(kind: str) -> dict[str, torch.Tensor]:
    """Two modules of a kind of adapter, of rank 2, under that kind's names."""
    modules = ("model.layers.0.q", "model.layers.1.q")
    if kind == "MLX":
        return {
            f"{module}.lora_{role}": torch.ones(*shape)
            for module in modules
            for role, shape in (("a", (5, 2)), ("b", (2, 3)))
        }
    tensors = {name: tensor for module in modules for name, tensor in factors(module).items()}
    extra = {f"{PREFIX}{module}.lora_E": torch.ones(2, 1) for module in modules} if kind == "ADALORA" else {}
    return tensors | extra


def write(folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / ("adapters.safetensors" if kind == "MLX" else "adapter_model.safetensors"))
    return folder


def share_read(seen: Counter[bool]) -> float:
    return seen[True] / seen.total()


@pytest.mark.parametrize("kind", BASES)
def test_any_fields_of_a_config(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    seen: Counter[bool] = Counter()
    tensors = stored(kind)

    @given(data=st.data())
    @PLENTY
    def check(data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True))
        wild = data.draw(st.integers(0, 4)) == 0
        fields = {name: data.draw(JSON if wild else FIELDS[name]) for name in names}
        folder = write(tmp_path_factory.mktemp("any"), kind, BASES[kind] | fields, tensors)
        seen[read(folder) == ""] += 1

    check()
    assert 0.05 < share_read(seen) < 0.95


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda tensor: tensor.T.contiguous(),
    "row": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "column": lambda tensor: torch.cat([tensor, tensor[:, :1]], 1),
    "flat": lambda tensor: tensor.reshape(-1),
    "stack": lambda tensor: tensor[None].clone(),
    "convolution": lambda tensor: tensor[..., None, None].clone(),
    "dimensions": lambda tensor: tensor.reshape(*[1] * 20, -1),
    "empty": lambda tensor: tensor[:0].clone(),
    "single": lambda _: torch.tensor(1.0),
    "nan": lambda tensor: torch.full_like(tensor, math.nan),
    "infinite": lambda tensor: torch.full_like(tensor, -math.inf),
    "zero": torch.zeros_like,
    "large": lambda tensor: torch.full_like(tensor, 3e38),
    "small": lambda tensor: torch.full_like(tensor, 1e-44),
    "half": torch.Tensor.half,
    "brain": torch.Tensor.bfloat16,
    "double": torch.Tensor.double,
    "integer": lambda tensor: tensor.to(torch.int8),
    "quarter": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex": lambda tensor: tensor.to(torch.complex64),
}
RENAMES: tuple[tuple[str, str], ...] = (
    (".weight", ""),
    (".weight", ".default.weight"),
    (".weight", ".bias"),
    (".weight", ".a.b.weight"),
    ("base_model.model.", ""),
    ("base_model.model.", "base_model.model.base_model.model."),
    ("base_model.model.", "module.base_model.model._orig_mod."),
    ("lora_A", "lora_B"),
    ("lora_B", "lora_A"),
    ("lora_A", "lora_embedding_A"),
    ("lora_B", "lora_embedding_B"),
    ("lora_A", "lora_a"),
    ("lora_A", "lora_E"),
    ("lora_B", "lora_magnitude_vector"),
    ("lora_B", "lora_next"),
    ("layers.0", "layers.1"),
    ("layers", "lay\x1bers"),
    ("layers", "lay\ners"),
    ("layers", "l" * 600),
    ("model.layers.0.q", ""),
    (".q.", "."),
    (".lora_A", ".base_layer"),
    ("model.layers.1.q.lora_A", "score.modules_to_save.default"),
    ("model.layers.1.q.lora_A", "score.original_module"),
)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("kind", BASES)
def test_any_change_to_the_tensors_and_their_names(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    seen: Counter[bool] = Counter()

    @given(data=st.data())
    @PLENTY
    def check(data: st.DataObject) -> None:
        held = stored(kind)
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(sorted(held)))
            if data.draw(st.booleans()):
                old, new = data.draw(st.sampled_from(RENAMES) | st.tuples(st.sampled_from(name.split(".")), TEXT))
                tensor = held[name].clone() if data.draw(st.booleans()) else held.pop(name)
                held[name.replace(old, new).encode("utf-8", "replace").decode()] = tensor
            elif held[name].ndim == 2 and held[name].dtype == torch.float32:
                held[name] = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](held[name])
        flags = data.draw(st.sampled_from([{}, {}, {"use_dora": True}, {"lora_bias": True}, {"enable_lora": [True]}]))
        folder = tmp_path_factory.mktemp("any")
        if kind == "MLX" or data.draw(st.booleans()):
            write(folder, kind, BASES[kind] | flags, held)
        else:
            (folder / "adapter_config.json").write_text(json.dumps(BASES[kind] | flags))
            torch.save(held, folder / "adapter_model.bin", _use_new_zipfile_serialization=data.draw(st.booleans()))
        seen[read(folder) == ""] += 1

    check()
    assert 0.05 < share_read(seen) < 0.95


DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "BOOL": 1,
    "F8_E5M2": 1,
    "F4": 1,
    "C64": 8,
    "X": 4,
}


def test_any_header_of_a_safetensors_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    seen: Counter[bool] = Counter()
    sizes = st.integers(-1, 4) | st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, 1.5])
    flaws = st.sampled_from(["none", "type", "entry", "length", "end", "metadata"])

    @given(flaw=flaws, data=st.data())
    @PLENTY
    def check(flaw: str, data: st.DataObject) -> None:
        header: dict[str, Any] = {}
        end, missing = 0, data.draw(st.integers(-9, 64)) if flaw == "end" else 0
        for name, tensor in factors("q").items():
            dtype = data.draw(st.sampled_from(sorted(DTYPES))) if flaw == "type" else "F32"
            size = tensor.numel() * DTYPES[dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
        if flaw == "entry":
            entry = header[data.draw(st.sampled_from(sorted(header)))]
            entry[data.draw(st.sampled_from([*entry, "more"]))] = data.draw(JSON | st.lists(sizes, max_size=4))
        if flaw == "metadata":
            header["__metadata__"] = data.draw(JSON)
        text = json.dumps(header).encode() + b" " * data.draw(st.integers(0, 9))
        lengths = st.sampled_from([0, 1, 2, len(text) - 1, len(text) + 1, 1 << 31, 1 << 60, 1 << 63, (1 << 64) - 1])
        content = struct.pack("<Q", data.draw(lengths) if flaw == "length" else len(text)) + text
        folder = write_adapter(tmp_path_factory.mktemp("any"))
        held = (b"\0\0\x80?" * (end // 4 + 9))[: max(end - missing, 0)]
        (folder / "adapter_model.safetensors").write_bytes(content + held)
        seen[read(folder) == ""] += 1

    check()
    assert 0.05 < share_read(seen) < 0.95


@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x93NUMPY", b"\x08\0\0\0\0\0\0\0"]),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, start: bytes) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("any"))
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(start + content)
    assert read(folder)
