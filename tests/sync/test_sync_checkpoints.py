"""Folders checkpoint-N that stand for one adapter: the newest or all, on the Hub and in folders; MLX-LM's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sync_world import Bench, outcomes, reasons, write_adapter

from hub_router.errors import SettingsError


def checkpoints(folder: Path) -> Path:
    for step in (5, 20, 100):
        write_adapter(folder / f"checkpoint-{step}", step, card=None)
    return folder


def test_a_repository_s_newest_checkpoint_then_all_then_all_of_a_new_commit(bench: Bench) -> None:
    folder = checkpoints(bench.repo("owner/run").parent / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    assert outcomes(bench.sync("owner/run")) == {"owner/run/checkpoint-100": "added"}
    assert outcomes(bench.sync("owner/run", checkpoints="all")) == {
        "owner/run/checkpoint-100": "unchanged",
        "owner/run/checkpoint-20": "added",
        "owner/run/checkpoint-5": "added",
    }
    bench.asked()
    every = {f"owner/run/checkpoint-{step}": "unchanged" for step in (5, 20, 100)}
    assert outcomes(bench.sync("owner/run", checkpoints="all")) == every
    assert len(bench.asked()) == 1
    # What was asked for once is not taken back by a run that does not say so.
    assert outcomes(bench.sync("owner/run")) == every
    write_adapter(folder / "checkpoint-200", 200, card=None)
    assert outcomes(bench.sync("owner/run")) == dict.fromkeys(every, "updated") | {"owner/run/checkpoint-200": "added"}


def test_checkpoints_below_an_adapter_come_along_when_all_are_asked_for(bench: Bench) -> None:
    checkpoints(bench.repo("owner/run"))
    summary = bench.sync("owner/run")
    assert outcomes(summary) == {"owner/run": "added"}
    assert "name one to sync it, or ask for all checkpoints" in reasons(summary)
    assert len(outcomes(bench.sync("owner/run", checkpoints="all"))) == 4


def test_local_checkpoints(bench: Bench, tmp_path: Path) -> None:
    top = checkpoints(tmp_path / "run")
    newest, older = f"{top}/checkpoint-100", (f"{top}/checkpoint-20", f"{top}/checkpoint-5")
    assert outcomes(bench.sync(top)) == {newest: "added"}
    assert outcomes(bench.sync(top, checkpoints="all")) == dict.fromkeys(older, "added") | {newest: "unchanged"}
    # They are still there, so a run for the newest does not call them missing.
    assert outcomes(bench.sync(top)) == {newest: "unchanged"}
    assert {status for status, _ in bench.rows().values()} == {"ready"}


def test_neither_is_an_error(bench: Bench) -> None:
    with pytest.raises(SettingsError, match="checkpoints is 'latest', expected 'newest' or 'all'"):
        bench.sync("owner/run", checkpoints="latest")


def test_mlx_adapters_are_fetched_and_used(bench: Bench) -> None:
    folder = bench.folder / "hub" / "owner" / "mlx"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": draw.normal(size=(8, 2)).astype(np.float32)}
    tensors["model.layers.0.self_attn.q_proj.lora_b"] = draw.normal(size=(2, 8)).astype(np.float32)
    save_file(tensors, folder / "adapters.safetensors")
    save_file(tensors, folder / "0000100_adapters.safetensors")
    fields = {"model": "owner/base", "fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert outcomes(bench.sync("owner/mlx")) == {"owner/mlx": "added"}
    row = bench.adapter("owner/mlx")
    assert (row.status, row.ranks, row.base_model_resolved) == ("ready", [2], "owner/base")
    assert not any("0000100" in entry for entry in bench.asked())


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["pytorch_lora_weights.safetensors"], "no adapter_config.json (1 files), found diffusers LoRA weights"),
        (["config.json", "model.safetensors"], "no adapter_config.json (2 files), found a full model"),
        (["notes.txt"], "no adapter_config.json (1 files)"),
        (["adapter_config.json", "pytorch_adapter.bin"], "beside adapter_config.json, found AdapterHub weights"),
        (["adapter_config.json", "adapters.npz"], "beside adapter_config.json, found MLX-LM weights of before 2024"),
    ],
)
def test_other_formats_are_named_by_their_files(bench: Bench, files: list[str], reason: str) -> None:
    folder = bench.folder / "hub" / "owner" / "other"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    summary = bench.sync("owner/other")
    assert set(outcomes(summary).values()) == {"unsupported"}
    assert reason in reasons(summary)
