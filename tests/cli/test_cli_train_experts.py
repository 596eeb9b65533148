"""``train --out`` of several adapters together, and compose with them; xlora and mixlora from the catalog."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World, save_adapter

POOL = "colours,capitals,moods"
QUICK = ("--set", "steps=3", "--set", "batch_size=4")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Examples of two tasks that no adapter is of."""
    path = tmp_path / "lines.jsonl"
    rows = [
        {"input": f"{task} {number}", "output": "yes", "task": task} for task in ("up", "down") for number in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("method", ["xlora", "mixlora"])
def test_gates_of_methods_that_read_beyond_the_module(run: Run, run_json: Callable[..., Any], method: str) -> None:
    assert run_json("train", method, "--adapters", POOL, "--dry-run", *QUICK)["steps"] == 3
    assert run_json("train", method, "--adapters", POOL, *QUICK)["prototypes"] == f"{method}@1"
    run("compose", "mine", "colours", "capitals", "moods", "--method", method, "--set", f"prototypes={method}")
    assert run_json("generate", "mine", "hello", "--max-new-tokens", "2")
    assert f"{method}@1" in run("prototypes", "show", method).stdout


def test_new_experts_by_the_labels_of_their_tasks(
    run: Run, run_json: Callable[..., Any], world: World, lines: Path, tmp_path: Path
) -> None:
    given = (
        "train",
        "experts",
        "--base",
        world.base,
        "--data",
        lines,
        "--out",
        tmp_path / "out",
        *QUICK,
        "--set",
        "r=2",
    )
    made = run_json(*given, "--dry-run")
    assert (made["adapters"], made["steps"], made["loss"]) == (["up", "down"], 3, None)
    assert not (tmp_path / "out").exists()
    result = run(*given)
    assert "experts (2 adapters), 3 steps on 12 examples" in result.stdout
    folder = tmp_path / "out"
    for command in (f"Next: hub-router sync {folder}/up", f"Then: hub-router compose NAME up={folder}/up down="):
        assert command in result.stderr
    assert json.loads((folder / "up" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world.base)
    assert not (tmp_path / "out" / "gates.safetensors").exists()
    run("sync", tmp_path / "out" / "up", tmp_path / "out" / "down")
    run("compose", "both", f"up={folder}/up", f"down={folder}/down", "--method", "uniform")
    assert "exists and is left as it is" in run(*given, status=1).stderr


@pytest.mark.parametrize("method", ["lora-mixer", "mixlora"])
def test_new_adapters_with_their_gates(
    run: Run, run_json: Callable[..., Any], world: World, lines: Path, tmp_path: Path, method: str
) -> None:
    number = ("--set", "experts=3") if method == "mixlora" else ()
    given = ("train", method, "--base", world.base, "--data", lines, "--out", tmp_path / "out", *QUICK, *number)
    assert run_json(*given, "--dry-run")["steps"] == 3
    result = run(*given)
    names = ["expert-1", "expert-2", "expert-3"] if method == "mixlora" else ["up", "down"]
    assert f"--method {method} --set prototypes=" in result.stderr
    run("sync", *(tmp_path / "out" / name for name in names))
    gates = tmp_path / "out" / "gates.safetensors"
    run(
        *("compose", "joint", *names, "--base-model", world.base, "--method", method),
        *("--set", f"prototypes={gates}"),
    )
    assert run_json("generate", "joint", "up 3", "--max-new-tokens", "2")
    config = json.loads((tmp_path / "out" / names[0] / "adapter_config.json").read_text())
    if method == "mixlora":
        assert all(".mlp." in name for name in config["target_modules"])


def test_adapters_of_the_catalog_are_trained_on(run_json: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    given = ("train", "lora-mixer", "--adapters", POOL, "--out", tmp_path / "out", *QUICK, "--set", "preserve=0.01")
    made = run_json(*given, "--set", "balance=none")
    assert made["adapters"] == POOL.split(",")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("capitals", "colours"),
        *("gates.safetensors", "moods"),
    ]
    refused = run("train", "lora-mixer", "--adapters", POOL, "--out", tmp_path / "more", "--set", "r=4", status=1)
    assert "r are settings of new adapters" in refused.stderr
    number = ("train", "mixlora", "--adapters", POOL, "--out", tmp_path / "more", "--set", "experts=4")
    assert "experts are settings of new adapters" in run(*number, status=1).stderr
    # What was printed works, although every name now stands for two adapters.
    hint = next(
        line for line in run(*given[:4], "--out", tmp_path / "again", *QUICK).stderr.splitlines() if "Then: " in line
    )
    run("sync", *(tmp_path / "again" / name for name in POOL.split(",")))
    run(*shlex.split(hint.partition("hub-router ")[2].replace("NAME", "joined")))


def test_what_is_wrong_is_said_before_anything_is_trained(run: Run, world: World, lines: Path, tmp_path: Path) -> None:
    base = ("--base", world.base, "--data", lines, "--out", tmp_path / "out")
    for given, expected, status in (
        (("train", "experts", "--adapters", POOL), "write into --out DIR", 2),
        (("train", "arrow", *base), "write into --out DIR", 2),
        (("train", "mixlora", *base, "--set", "experts=0"), "experts=0, expected an integer", 1),
        (("train", "experts", *base, "--set", "top_k=2"), "there are no settings top_k of experts", 1),
        (("train", "mixlora", *base, "--set", "balance=nothing"), "balance='nothing'", 1),
        (("train", "experts", *base, "--adapters", POOL), "adapter 'up' is not in the pool", 1),
    ):
        assert expected in run(*given, status=status).stderr
        assert not (tmp_path / "out").exists()


def test_settings_of_experts_are_listed(run_json: Callable[..., Any]) -> None:
    found = {each["name"]: each["default"] for each in run_json("train", "experts", "--settings")["settings"]}
    assert (found["r"], found["learning_rate"], found["target_modules"]) == (8, 1e-5, "all-linear")
    joint = run_json("train", "mixlora", "--settings", "--out", "unused")["settings"]
    found = {each["name"]: each["default"] for each in joint}
    assert (found["experts"], found["preserve"], found["r"], found["alpha"]) == (8, 0.0, 8, 0.01)
    assert "prototypes" not in found


def test_adapters_that_changed_since_their_sync_are_refused_before_training(
    run: Run, world: World, home: Path, tmp_path: Path
) -> None:
    folders = [shutil.copytree(world.adapters[name], tmp_path / "mine" / f"my-{name}") for name in ("colours", "moods")]
    run("sync", *folders)
    save_adapter(world.base, folders[0], "colours", seed=7)
    for given in (("maple", "--dry-run"), ("maple",), ("lora-mixer", "--out", tmp_path / "out")):
        refused = run("train", given[0], "--adapters", "my-colours,my-moods", *given[1:], *QUICK, status=1)
        assert f"synced: my-colours; run: hub-router sync {folders[0]}" in refused.stderr


def test_a_set_of_other_weights_or_another_base_is_told(
    run: Run, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [shutil.copytree(world.adapters[name], tmp_path / "mine" / f"my-{name}") for name in ("colours", "moods")]
    run("sync", *folders)
    run("train", "xlora", "--adapters", "my-colours,my-moods", *QUICK)
    exported = tmp_path / "xlora.safetensors"
    run("prototypes", "export", "xlora", exported)
    other = shutil.copytree(world.base, tmp_path / "other")
    given = ("compose", "mine", "my-colours", "my-moods", "--method", "xlora", "--replace")
    for name in ("xlora", exported):
        caplog.clear()
        run(*given, "--base", other, "--set", f"prototypes={name}")
        assert f"was trained on {world.base}, and this pool is on {other}" in caplog.text
    save_adapter(world.base, folders[0], "colours", seed=7)
    run("sync", folders[0])
    refused = run(*given, "--set", f"prototypes={exported}", status=1)
    assert "was made for other weights of: my-colours" in refused.stderr
