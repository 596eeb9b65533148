from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import PLAIN, PREFIX, factors, peft_adapter, tiny_llama, write_adapter
from safetensors.torch import load_file, save_file

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.facts import inspect
from hub_router.lora.reader import read_adapter

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"model\.layers\.0\..*": 20, "q_proj": 3}},
    "both_patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"^model.layers.1.mlp.down_proj": 11}},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "all_linear": {"target_modules": "all-linear"},
    "regex_targets": {"target_modules": r".*\.(k_proj|up_proj)"},
    "one_layer": {"layers_to_transform": [1]},
}


def assert_as_peft(model: Any, folder: Path, tolerance: float = 1e-6) -> None:
    """Every module's scaling * B A equals the delta that PEFT itself would merge."""
    adapter = read_adapter(folder)
    layers = {
        name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        read = adapter.modules[name]
        delta = read.scaling * (read.B.double() @ read.A.double())
        expected = layer.get_delta_weight("default").double()
        assert torch.linalg.norm(delta - expected) <= tolerance * torch.linalg.norm(expected), name
        assert read.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_peft_computes(tmp_path: Path, variant: str) -> None:
    assert_as_peft(peft_adapter(tmp_path, **VARIANTS[variant]), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_half_precision_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    model = peft_adapter(tmp_path, dtype=dtype)
    adapter = read_adapter(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    assert adapter.modules[module].A.dtype == dtype
    assert torch.equal(adapter.modules[module].B, stored[f"{PREFIX}{module}.lora_B.weight"])
    # PEFT multiplies in the half precision itself, so its own product is the rounded one.
    assert_as_peft(model, tmp_path, tolerance=torch.finfo(dtype).eps * 2)


def test_reads_torch_save_files(tmp_path: Path) -> None:
    model = peft_adapter(tmp_path, safe=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert_as_peft(model, tmp_path)


def test_reads_files_of_torch_before_zip(tmp_path: Path) -> None:
    expected = factors()
    write_adapter(tmp_path, expected, safe=False)
    torch.save(expected, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    read = read_adapter(tmp_path).modules["layers.0.q"]
    assert torch.equal(read.A, expected[f"{PREFIX}layers.0.q.lora_A.weight"])


def test_prefers_safetensors_over_bin(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(rank=2))
    torch.save(factors(rank=3), tmp_path / "adapter_model.bin")
    assert read_adapter(tmp_path).modules["layers.0.q"].rank == 2


@pytest.mark.parametrize(
    "spelling",
    [
        "base_model.model.{module}.lora_{factor}.weight",
        "base_model.model.{module}.lora_{factor}.default.weight",
        "base_model.model.{module}.lora_{factor}.default",
        "base_model.model.{module}.lora_{factor}",
        "base_model.model.{module}.lora_{factor}.my-task.weight",
        "base_model.model.base_model.model.{module}.lora_{factor}.weight",
        "base_model.model.base_model.model.base_model.model.{module}.lora_{factor}.default.weight",
        "module.base_model.model.{module}.lora_{factor}.weight",
        "base_model.model._orig_mod.{module}.lora_{factor}.weight",
        "{module}.lora_{factor}.weight",
        "{module}.lora_{factor}",
    ],
)
def test_reads_every_key_spelling(tmp_path: Path, spelling: str) -> None:
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    module = "model.layers.11.self_attn.q_proj"
    tensors = {spelling.format(module=module, factor="A"): A, spelling.format(module=module, factor="B"): B}
    adapter = read_adapter(write_adapter(tmp_path, tensors))
    assert list(adapter.modules) == [module]
    assert torch.equal(adapter.modules[module].A, A)
    assert torch.equal(adapter.modules[module].B, B)
    assert adapter.modules[module].scaling == 2.0


def test_reads_mixed_dtypes_within_one_file(tmp_path: Path) -> None:
    tensors = factors() | {f"{PREFIX}layers.0.q.lora_B.weight": torch.ones(3, 2, dtype=torch.bfloat16)}
    read = read_adapter(write_adapter(tmp_path, tensors)).modules["layers.0.q"]
    assert (read.A.dtype, read.B.dtype) == (torch.float32, torch.bfloat16)


def test_name_and_identity(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sst2")
    assert read_adapter(folder).name == "sst2"
    named = read_adapter(folder, "mine")
    assert (named.name, named.path, named.base_model) == ("mine", folder, "org/base")


def test_rank_that_differs_from_the_config_is_noted_and_scaling_stays_the_configs(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, factors(rank=3), PLAIN | {"r": 2, "lora_alpha": 5}))
    assert adapter.modules["layers.0.q"].rank == 3
    assert adapter.modules["layers.0.q"].scaling == 2.5
    assert any("layers.0.q 3 (config 2)" in note for note in adapter.notes)


def test_config_without_rank_takes_it_from_the_tensors(tmp_path: Path) -> None:
    config = {key: value for key, value in PLAIN.items() if key != "r"}
    adapter = read_adapter(write_adapter(tmp_path, factors(rank=3), config | {"lora_alpha": 12}))
    assert adapter.modules["layers.0.q"].scaling == 4.0
    assert any("states no r" in note for note in adapter.notes)


def test_targets_that_differ_from_the_tensors_are_noted(tmp_path: Path) -> None:
    tensors = factors("layers.0.q") | factors("layers.0.extra")
    adapter = read_adapter(write_adapter(tmp_path, tensors, PLAIN | {"target_modules": ["q", "0.q", "v"]}))
    assert any(note.startswith("target_modules names v,") for note in adapter.notes)
    assert any("layers.0.extra" in note for note in adapter.notes)


def test_all_zero_update_is_usable_with_a_note(tmp_path: Path) -> None:
    tensors = factors("layers.0.q") | factors("layers.1.q")
    tensors[f"{PREFIX}layers.1.q.lora_B.weight"].zero_()
    adapter = read_adapter(write_adapter(tmp_path, tensors))
    assert set(adapter.modules) == {"layers.0.q", "layers.1.q"}
    assert [note for note in adapter.notes if "direction" in note] == [
        "1 of 2 modules have an all-zero B A, no direction: layers.1.q"
    ]


def test_what_lies_beside_the_factors_is_kept_and_noted(tmp_path: Path) -> None:
    beside = {
        "score.weight": True,
        "classifier.modules_to_save.default.dense.bias": True,
        "lm_head.weight": False,
        "model.norm.modules_to_save.default.weight": True,
        "layers.0.q.base_layer.bias": False,
        "layers.1.mlp.bias": False,
    }
    original = {PREFIX + "score.original_module.weight": torch.zeros(2)}
    tensors = factors() | {PREFIX + name: torch.full((2,), float(n)) for n, name in enumerate(beside)} | original
    adapter = read_adapter(write_adapter(tmp_path, tensors))
    assert list(adapter.modules) == ["layers.0.q"]
    assert {path: (parameter.apart, parameter.value[0].item()) for path, parameter in adapter.saved.items()} == {
        name.replace(".modules_to_save.default", "").replace(".base_layer", ""): (apart, n)
        for n, (name, apart) in enumerate(beside.items())
    }
    alone = "applied only where this adapter is used alone"
    assert [note for note in adapter.notes if "alone" in note] == [
        f"task head score, classifier.dense: {alone}",
        f"2 trained biases (layers.0.q.bias, layers.1.mlp.bias): {alone}",
        f"saved parameters lm_head.weight, model.norm.weight: {alone}, or where they equal the base model's",
    ]


def test_modules_to_save_of_peft(tmp_path: Path) -> None:
    model = peft_adapter(tmp_path, modules_to_save=["lm_head"])
    saved = read_adapter(tmp_path).saved
    assert list(saved) == ["lm_head.weight"]
    assert saved["lm_head.weight"].apart
    assert torch.equal(saved["lm_head.weight"].value, model.base_model.model.lm_head.modules_to_save.default.weight)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights="olora"'),
    ],
)
def test_peft_variants_that_are_not_plain_lora_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    peft_adapter(tmp_path, **config)
    with pytest.raises(UnsupportedAdapterError) as refusal:
        read_adapter(tmp_path)
    assert reason in str(refusal.value)


def damaged(edit: str) -> dict[str, torch.Tensor]:
    """Two modules, the second one broken in one way."""
    good, bad = factors("layers.0.q"), factors("layers.1.v_proj")
    a, b = bad
    if edit in ("nan", "inf"):
        bad[b][1, 1] = float(edit)
    elif edit == "A only":
        del bad[b]
    elif edit == "B only":
        del bad[a]
    elif edit == "ranks":
        bad[b] = torch.randn(3, 4)
    elif edit == "transposed":
        bad = {a: bad[a].T.contiguous(), b: bad[b].T.contiguous()}
    elif edit == "one-dimensional":
        bad[a] = torch.randn(2)
    elif edit == "convolution":
        bad = {a: torch.randn(2, 5, 3, 3), b: torch.randn(3, 2, 1, 1)}
    elif edit == "duplicate":
        bad[a.replace(".weight", ".default.weight")] = torch.randn(2, 5)
    return good | bad


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("nan", "NaN or infinite values in lora_B"),
        ("inf", "NaN or infinite values in lora_B"),
        ("A only", "lora_A without lora_B"),
        ("B only", "lora_B without lora_A"),
        ("ranks", "A (2, 5) and B (3, 4) that do not chain"),
        ("transposed", "do not chain"),
        ("one-dimensional", "do not chain"),
        ("convolution", "is a convolution"),
        ("duplicate", "2 tensors for lora_A"),
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_damaged_weights_name_the_module(tmp_path: Path, edit: str, reason: str, safe: bool) -> None:
    write_adapter(tmp_path, damaged(edit), safe=safe)
    with pytest.raises(UnsupportedAdapterError) as refusal:
        read_adapter(tmp_path, "mine")
    message = str(refusal.value)
    assert reason in message
    assert "layers.1.v_proj" in message
    assert "layers.0.q" not in message
    assert message.startswith("adapter 'mine' (")
    assert "\n" not in message


def test_all_damaged_modules_are_listed_and_the_catalogs_reason_counts_them(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, name in enumerate("qkvoguxyz"):
        tensors |= {f"{PREFIX}layers.{layer}.{name}.lora_A.weight": torch.ones(2, 5) for layer in range(number + 1)}
    with pytest.raises(UnsupportedAdapterError) as refusal:
        read_adapter(write_adapter(tmp_path, tensors))
    faults = refusal.value.faults
    assert len(faults) == 9
    assert all(fault in str(refusal.value) for fault in faults)
    assert {"layers.0.q has lora_A without lora_B", "layers.{0-8}.z has lora_A without lora_B"} < set(faults)
    with pytest.raises(UnsupportedAdapterError, match=r"and 6 more$") as short:
        inspect(tmp_path)
    assert short.value.faults == faults


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapted_head_comes_with_a_copy_of_its_frozen_weight(tmp_path: Path, safe: bool) -> None:
    model = peft_adapter(tmp_path, target_modules=["lm_head", "q_proj"], safe=safe)
    adapter = read_adapter(tmp_path)
    assert_as_peft(model, tmp_path)
    assert list(adapter.copies) == ["lm_head.weight"]
    assert torch.equal(adapter.copies["lm_head.weight"], tiny_llama().lm_head.weight)
    assert adapter.notes == inspect(tmp_path).notes
    assert adapter.notes == ("lm_head.weight saved along as in the base model, compared when composing",)


def test_a_nan_in_a_tensor_too_large_to_sum_is_found_and_large_values_are_not_mistaken(tmp_path: Path) -> None:
    large = factors() | {f"{PREFIX}layers.0.q.lora_A.weight": torch.full((2, 5), 3e38)}
    assert read_adapter(write_adapter(tmp_path, large)).modules["layers.0.q"].A.max() == torch.tensor(3e38)


def test_names_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    for name in ("layers\x1b[2J.q.lora_A.weight", "x" * 600 + ".lora_A.weight"):
        save_file({name: torch.ones(2, 5)}, write_adapter(tmp_path) / "adapter_model.safetensors")
        with pytest.raises(UnsupportedAdapterError, match="too long or not printable") as refusal:
            read_adapter(tmp_path)
        assert "\x1b" not in str(refusal.value)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="expected a folder, found nothing"):
        read_adapter(tmp_path / "absent")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UnsupportedAdapterError, match="expected a folder, found a file"):
        read_adapter(file)
