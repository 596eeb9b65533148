"""Formats other than today's PEFT, each against a loop or against the formula that its own library computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import PLAIN, PREFIX, factors, write_adapter
from safetensors.torch import save_file

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.facts import inspect
from hub_router.lora.reader import read_adapter


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(folder)
    return str(caught.value)


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True], [True, True]])
@pytest.mark.parametrize("safe", [True, False])
def test_merged_linear_by_loops(tmp_path: Path, enabled: list[bool], safe: bool) -> None:
    # Early PEFT: lora_A of all adapted parts, a grouped 1-d convolution as lora_B, its output spread over the parts.
    n, r, d_in, height = sum(enabled), 3, 5, 4
    A, B = randn(n * r, d_in), randn(n * height, r, 1, seed=1)
    tensors = {f"{PREFIX}h.0.qkv.lora_A.weight": A, f"{PREFIX}h.0.qkv.lora_B.weight": B}
    config = PLAIN | {
        "r": r,
        "lora_alpha": 6,
        "enable_lora": enabled,
        "fan_in_fan_out": True,
        "target_modules": ["qkv"],
    }
    folder = write_adapter(tmp_path, tensors, config, safe=safe)
    found = read_adapter(folder).modules["h.0.qkv"]
    x = randn(d_in, seed=2)
    expected = torch.zeros(height * len(enabled))
    group = 0
    for part, on in enumerate(enabled):
        if on:
            h = A[group * r : (group + 1) * r] @ x
            for row in range(height):
                expected[part * height + row] = 2.0 * (B[group * height + row, :, 0] @ h)
            group += 1
    assert torch.allclose(found.scaling * found.B @ (found.A @ x), expected, atol=1e-6)
    assert inspect(folder).ranks == (n * r,)
    assert inspect(folder).notes == ()


def test_merged_linear_that_does_not_chain(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}q.lora_A.weight": randn(4, 5), f"{PREFIX}q.lora_B.weight": randn(6, 3, 1)}
    folder = write_adapter(tmp_path, tensors, PLAIN | {"enable_lora": [True, False, True]})
    assert "expected (2 r, D_in) and (2 d, r, 1) for enable_lora=[True, False, True]" in refusal(folder)


def test_adalora_folds_its_singular_values(tmp_path: Path) -> None:
    A, B, E = randn(3, 5), randn(4, 3, seed=1), randn(3, 1, seed=2)
    tensors = {f"{PREFIX}q.lora_{name}": tensor for name, tensor in (("A", A), ("B", B), ("E", E))}
    config = PLAIN | {"peft_type": "ADALORA", "init_r": 12, "lora_alpha": 8, "rank_pattern": None}
    found = read_adapter(write_adapter(tmp_path, tensors, config, safe=False)).modules["q"]
    expected = 8 / (12 + 1e-5) * B @ (A * E)
    assert torch.allclose(found.scaling * found.B @ found.A, expected, atol=1e-6)
    assert inspect(tmp_path).peft_type == "ADALORA"
    assert inspect(tmp_path).notes == ()


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_is_transposed(tmp_path: Path, dora: bool) -> None:
    a, b, table, out = randn(5, 3), randn(3, 4, seed=1), randn(7, 3, seed=2), randn(3, 5, seed=3)
    tensors = {"m.0.q.lora_a": a, "m.0.q.lora_b": b, "m.embed_tokens.lora_a": table, "m.embed_tokens.lora_b": out}
    if dora:
        tensors |= {"m.0.q.m": randn(4, seed=4).abs()}
        del tensors["m.embed_tokens.lora_a"], tensors["m.embed_tokens.lora_b"]
    save_file(tensors, tmp_path / "adapters.safetensors")
    fields = {"model": "org/base", "lora_parameters": {"rank": 3, "scale": 20.0}, "num_layers": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"fine_tune_type": "dora" if dora else "lora"}))
    adapter = read_adapter(tmp_path)
    x = randn(5, seed=6)
    found = adapter.modules["m.0.q"]
    assert torch.allclose(found.scaling * found.B @ (found.A @ x), 20.0 * (x @ a) @ b, atol=1e-4)
    if not dora:
        looked_up = adapter.modules["m.embed_tokens"]
        assert (looked_up.lookup, looked_up.d_in, looked_up.d_out) == (True, 7, 5)
        assert torch.allclose(looked_up.B @ looked_up.A[:, 4], table[4] @ out, atol=1e-5)
    assert (found.magnitude is not None) == dora
    assert (adapter.base_model, inspect(tmp_path).weight_files) == ("org/base", ("adapters.safetensors",))


def test_mlx_dora_of_an_embedding_is_another_function(tmp_path: Path) -> None:
    tensors = {"m.embed_tokens.lora_a": randn(7, 3), "m.embed_tokens.lora_b": randn(3, 5), "m.embed_tokens.m": randn(7)}
    save_file(tensors, tmp_path / "adapters.safetensors")
    fields = {"model": "m", "fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert "m.embed_tokens is DoRA on an embedding by MLX-LM" in refusal(tmp_path)


def test_adalora_pruned_to_nothing_in_a_module(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}q.lora_A": randn(2, 5), f"{PREFIX}q.lora_B": randn(4, 2), f"{PREFIX}q.lora_E": randn(2, 1)}
    tensors |= {f"{PREFIX}v.lora_A": randn(0, 5), f"{PREFIX}v.lora_B": randn(4, 0), f"{PREFIX}v.lora_E": randn(0, 1)}
    adapter = read_adapter(write_adapter(tmp_path, tensors, PLAIN | {"peft_type": "ADALORA", "init_r": 4}))
    assert list(adapter.modules) == ["q"]
    assert "1 modules were pruned to rank 0: v" in adapter.notes
    plain = {f"{PREFIX}v.lora_A.weight": randn(0, 5), f"{PREFIX}v.lora_B.weight": randn(4, 0)}
    assert "is empty (shape (0, 5)), a shard was not gathered" in refusal(write_adapter(tmp_path / "b", plain))


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (3, 3, 3)])
def test_convolutions_are_named(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    tensors = {f"{PREFIX}c.lora_A.weight": randn(2, 5, *kernel), f"{PREFIX}c.lora_B.weight": randn(4, 2, *ones)}
    assert "c is a convolution" in refusal(write_adapter(tmp_path, tensors))


def test_a_trained_bias_beside_a_copied_weight_and_one_saved_twice(tmp_path: Path) -> None:
    beside = {"q.base_layer.weight": torch.ones(3, 5), "q.base_layer.bias": torch.ones(3)}
    tensors = factors("q") | {PREFIX + name: tensor for name, tensor in beside.items()}
    trained = read_adapter(write_adapter(tmp_path / "trained", tensors, PLAIN | {"bias": "lora_only"}))
    assert (list(trained.copies), list(trained.saved)) == (["q.weight"], ["q.bias"])
    frozen = read_adapter(write_adapter(tmp_path / "frozen", tensors))
    assert (list(frozen.copies), list(frozen.saved)) == (["q.bias", "q.weight"], [])
    twice = {"classifier.bias": torch.zeros(2), "classifier.modules_to_save.bias": torch.ones(2)}
    tensors = factors("q") | {PREFIX + name: tensor for name, tensor in twice.items()}
    saved = read_adapter(write_adapter(tmp_path / "twice", tensors, PLAIN | {"bias": "all"})).saved
    assert torch.equal(saved["classifier.bias"].value, torch.ones(2))
    listed = read_adapter(write_adapter(tmp_path / "listed", factors(), PLAIN | {"modules_to_save": ["score"]}))
    assert listed.not_stored == ("score",)
    assert "modules_to_save names score, for which there are no tensors" in listed.notes


def test_mlx_experts_are_refused(tmp_path: Path) -> None:
    save_file({"m.w1.lora_a": randn(2, 5, 3), "m.w1.lora_b": randn(2, 3, 4)}, tmp_path / "adapters.safetensors")
    fields = {"model": "m", "lora_parameters": {"rank": 3, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert "m.w1 is a stack of maps" in refusal(tmp_path)


def shard(folder: Path, suffix: str, change: Any = None) -> Path:
    """Two modules in two shards, with an index as transformers writes it."""
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    placed = {}
    for number, module in enumerate(("layers.0.q", "layers.1.q"), 1):
        name = f"adapter_model-0000{number}-of-00002.{suffix}"
        tensors = factors(module)
        (save_file if suffix == "safetensors" else torch.save)(tensors, folder / name)
        placed |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    if change is not None:
        change(folder, index)
    (folder / f"adapter_model.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    whole = read_adapter(write_adapter(tmp_path / "whole", factors("layers.0.q") | factors("layers.1.q")))
    sharded = read_adapter(shard(tmp_path / "sharded", suffix))
    assert list(sharded.modules) == ["layers.0.q", "layers.1.q"]
    for module, found in sharded.modules.items():
        assert torch.equal(found.A, whole.modules[module].A)
        assert torch.equal(found.B, whole.modules[module].B)
    facts = inspect(tmp_path / "sharded")
    assert facts.weight_files == tuple(f"adapter_model-0000{n}-of-00002.{suffix}" for n in (1, 2))
    assert facts.size_bytes == sum((tmp_path / "sharded" / name).stat().st_size for name in facts.weight_files)


def _rename_first(index: dict[str, Any], to: str) -> None:
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = to


SHARD_FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda folder, _: (folder / "adapter_model-00002-of-00002.safetensors").unlink(),
        "1 are missing, such as",
    ),
    "outside": (
        lambda _, index: _rename_first(index, "../../evil.safetensors"),
        "names '../../evil.safetensors', expected",
    ),
    "absolute": (lambda _, index: _rename_first(index, "/etc/passwd"), "names '/etc/passwd', expected"),
    "another": (lambda _, index: _rename_first(index, "training_args.bin"), "names 'training_args.bin', expected"),
    "no map": (lambda _, index: index.pop("weight_map"), "has no weight_map"),
    "empty": (lambda _, index: index.update(weight_map={}), "maps no tensors to files"),
    "type": (lambda _, index: index.update(weight_map={"a": 3}), "maps no tensors to files"),
    "other": (
        lambda _, index: index["weight_map"].update(x="adapter_model-00001-of-00002.safetensors"),
        "differ in 1 tensors",
    ),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_shards_that_cannot_be_trusted(tmp_path: Path, fault: str) -> None:
    change, expected = SHARD_FAULTS[fault]
    message = refusal(shard(tmp_path / "sharded", "safetensors", change))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "extra", "expected"),
    [
        ({"use_dora": True}, {}, "has no lora_magnitude, but the config says use_dora=True"),
        ({}, {"q.lora_magnitude_vector": (3,)}, "has a lora_magnitude, but the config says use_dora=False"),
        ({}, {"q.lora_B.bias": (3,)}, "has a lora_bias, but the config says lora_bias=False"),
        ({"lora_bias": True}, {}, "has no lora_bias, but the config says lora_bias=True"),
        ({"lora_bias": True}, {"q.lora_B.bias": (4,)}, "has a lora_bias of shape (4,), expected (3,)"),
        ({"use_dora": True}, {"q.lora_magnitude_vector": (2,)}, "has a lora_magnitude of shape (2,), expected (3,)"),
        ({}, {"q.lora_E": (2, 1)}, "has a lora_E, but the config says peft_type=LORA"),
        ({"peft_type": "ADALORA"}, {}, "has no lora_E, but the config says peft_type=ADALORA"),
        ({"peft_type": "ADALORA"}, {"q.lora_E": (3, 1)}, "has E (3, 1) for rank 2, expected (2, 1)"),
        ({}, {"q.lora_embedding_A": (2, 5)}, "has factors of a linear map and of an embedding"),
        ({}, {"e.lora_embedding_A": (2, 5)}, "layers.0.e has lora_embedding_A without lora_embedding_B"),
        (
            {"use_dora": True},
            {"e.lora_magnitude_vector": (2,)},
            "layers.0.e has lora_magnitude without lora_A and lora_B",
        ),
    ],
)
def test_tensors_and_config_that_contradict_each_other(
    tmp_path: Path, config: dict[str, Any], extra: dict[str, tuple[int, ...]], expected: str
) -> None:
    tensors = factors() | {f"{PREFIX}layers.0.{name}": torch.ones(shape) for name, shape in extra.items()}
    message = refusal(write_adapter(tmp_path, tensors, PLAIN | config))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"target_modules": r".*\.(v|k)"}, "1 modules have tensors but do not match target_modules: layers.0.q"),
        ({"target_modules": r"(?:.*?layers\.[\d]{1,}\.q)"}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": "("}, "a regular expression that is faulty or too slow"),
        ({"exclude_modules": ["q"]}, "1 modules have tensors but are in exclude_modules: layers.0.q"),
        ({"exclude_modules": r".*layers\.0.*"}, "1 modules have tensors but are in exclude_modules: layers.0.q"),
        ({"exclude_modules": r".*vision.*"}, None),
        ({"layers_to_transform": [1, 2]}, "1 modules are in layers that layers_to_transform leaves out: m.layers.0.q"),
        ({"layers_to_transform": 0}, None),
        ({"r": 4}, "by which they are scaled all the same: layers.0.q 2 (config 4)"),
    ],
)
def test_differences_are_noted(tmp_path: Path, config: dict[str, Any], note: str | None) -> None:
    module = "m.layers.0.q" if "layers_to_transform" in config else "layers.0.q"
    notes = read_adapter(write_adapter(tmp_path, factors(module), PLAIN | config)).notes
    assert notes == () if note is None else [note in each for each in notes] == [True], notes


def test_an_adapter_that_changes_nothing_is_no_adapter(tmp_path: Path) -> None:
    zero = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in factors().items()}
    with pytest.raises(
        UnsupportedAdapterError, match="B A is zero in all of its 1 modules, so the adapter changes nothing"
    ):
        inspect(write_adapter(tmp_path / "zero", zero))
    half = inspect(write_adapter(tmp_path / "half", zero | factors("layers.1.q")))
    assert "1 of 2 modules have an all-zero B A, no direction: layers.0.q" in half.notes
    biased = zero | {f"{PREFIX}layers.0.q.lora_B.bias": torch.ones(3)}
    assert inspect(write_adapter(tmp_path / "biased", biased, PLAIN | {"lora_bias": True})).modules
