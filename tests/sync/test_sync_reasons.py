"""What the catalog records of weights that cannot work: one reason in a line, and every fault by module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sync_world import Bench, outcomes, write_adapter


def test_every_fault_of_an_adapter_is_recorded_by_module(bench: Bench) -> None:
    folder = bench.repo("ann/broken")
    tensors = {}
    for layer in range(6):
        for name in ("q_proj", "v_proj", "o_proj", "up_proj"):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = np.ones((2, 8), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.ones((8, 2 + (name == "v_proj")), np.float32)
    for name in ("o_proj", "up_proj"):
        tensors[f"base_model.model.model.layers.3.{name}.lora_A.weight"] = np.full((2, 8, 1), 1, np.float32)
    tensors.pop("base_model.model.model.layers.5.q_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    assert outcomes(bench.sync("ann/broken")) == {"ann/broken": "unsupported"}
    row = bench.adapter("ann/broken")
    assert row.reason == "adapter_model.safetensors: model.layers.5.q_proj has lora_A without lora_B"
    assert row.notes == ["model.layers.5.q_proj has lora_A without lora_B"]

    tensors["base_model.model.model.layers.5.q_proj.lora_B.weight"] = np.ones((8, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    bench.sync("ann/broken")
    row = bench.adapter("ann/broken")
    assert row.notes == [
        "model.layers.{0-5}.v_proj has A (2, 8) and B (8, 3) that do not chain, expected (r, D_in) and (D_out, r)",
        "model.layers.3.o_proj has A (2, 8, 1) and B (8, 2) that do not chain, expected (r, D_in) and (D_out, r)",
        "model.layers.3.up_proj has A (2, 8, 1) and B (8, 2) that do not chain, expected (r, D_in) and (D_out, r)",
    ]
    assert "\n" not in row.reason
    assert row.reason.endswith(row.notes[-1])


def test_modules_without_direction_are_recorded_all(bench: Bench) -> None:
    folder = bench.repo("ann/partly")
    tensors = {}
    for layer in range(6):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = np.ones((2, 8), np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.full((8, 2), float(layer in (1, 5)), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert outcomes(bench.sync("ann/partly")) == {"ann/partly": "added"}
    note = "4 of 6 modules have an all-zero B A, no direction: model.layers.{0,2-4}.self_attn.q_proj"
    assert note in bench.adapter("ann/partly").notes


def test_what_the_config_of_an_unusable_adapter_says_is_kept(bench: Bench) -> None:
    folder = bench.repo("ann/loha")
    fields = {"peft_type": "LOHA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert outcomes(bench.sync("ann/loha")) == {"ann/loha": "unsupported"}
    row = bench.adapter("ann/loha")
    assert (row.peft_type, row.base_model, row.base_model_resolved) == ("LOHA", "owner/base", "owner/base")
    assert row.base_model_confidence == "high"


def test_folders_of_other_formats_are_named_beside_adapters(bench: Bench, tmp_path: Path) -> None:
    top = tmp_path / "pool"
    write_adapter(top / "good")
    for folder, name in (
        ("diffusers", "pytorch_lora_weights.safetensors"),
        ("bare", "adapter_model.safetensors"),
        ("__MACOSX", "._adapter_model.safetensors"),
        ("model", "model.safetensors"),
    ):
        (top / folder).mkdir()
        (top / folder / name).write_bytes(b"12345678")
    found = {line.repo_id.removeprefix(f"{top}/"): (line.outcome, line.reason) for line in bench.sync(top).outcomes}
    assert found == {
        "good": ("added", ""),
        "diffusers": (
            "unsupported",
            "no adapter_config.json, found diffusers LoRA weights (pytorch_lora_weights.safetensors)",
        ),
        "bare": ("unsupported", "no adapter_config.json, found adapter weights (adapter_model.safetensors)"),
        "__MACOSX": (
            "unsupported",
            "no adapter_config.json, found only macOS AppleDouble metadata (._adapter_model.safetensors)",
        ),
    }
    again = {line.repo_id.removeprefix(f"{top}/"): line.outcome for line in bench.sync(top).outcomes}
    assert again == {name: "unchanged" if name == "good" else "unsupported" for name in found}
    [alone] = bench.sync(top / "model").outcomes
    assert alone.reason.endswith("or below, found a full model (model.safetensors)")


def test_a_broken_newest_checkpoint_names_the_older_ones(bench: Bench, tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "checkpoint-1", card=None)
    write_adapter(tmp_path / "run" / "checkpoint-2", card=None)
    (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").unlink()
    [line] = bench.sync(tmp_path / "run").outcomes
    assert line.outcome == "unsupported"
    assert "older checkpoints skipped: checkpoint-1; name one to sync it" in line.reason
