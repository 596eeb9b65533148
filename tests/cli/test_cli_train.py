"""``train`` over a real catalog: the set it makes, what that is used for, and what is refused beforehand."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import Run, World, save_adapter
from safetensors.numpy import load_file

POOL = ("colours", "capitals", "moods")
MEMBERS = [part for name in POOL for part in ("--adapters", name)]
QUICK = ("--set", "steps=3", "--set", "batch_size=4")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("maple", ("--set", "mask=before")),
        ("phatgoose", ()),
        ("lora-mixer", ("--set", "balance=rsl", "--set", "entropy=minimise")),
    ],
)
def test_trained_gates_are_composed_generate_and_are_scored(
    run: Run, run_json: Callable[..., Any], tmp_path: Path, method: str, settings: tuple[str, ...]
) -> None:
    made = run_json("train", method, "--name", "gates", *MEMBERS, *QUICK, *settings, "--log", tmp_path / "log.jsonl")
    assert (made["prototypes"], made["method"], made["adapters"]) == ("gates@1", method, list(POOL))
    steps = 9 if method == "phatgoose" else 3
    assert made["steps"] == steps
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == steps
    assert all(line["loss"] > 0 and line["learning_rate"] > 0 for line in lines)
    composition = run_json("compose", "mix", *POOL, "--method", method, "--set", "prototypes=gates")["composition"]
    assert composition["hyperparameters"]["prototypes"] == "gates@1"
    assert run("generate", "mix", "What colour is the sky?", "--max-new-tokens", 4).stdout.strip()
    table = run_json("eval", "mix", "--methods", f"base,{method},all", "--samples", 1)
    assert method in table["mean"]
    assert "phatgoose" not in set(table["methods"]) - {method}
    assert table["notes"] == []
    unseen = run("eval", "mix", "--methods", method, "--samples", 1, "--unseen", "--tasks", "moods").stdout
    assert "the gates of gates@1 were trained on the tasks of all" in unseen


def test_next_version_and_its_parent(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    run("train", "maple", "--name", "gates", *MEMBERS, *QUICK)
    again = run_json("train", "maple", "--name", "gates", *MEMBERS, *QUICK, "--set", "prototypes=gates@1")
    assert again["prototypes"] == "gates@2"
    shown = run_json("prototypes", "show", "gates")
    assert "gates@1" in json.dumps(shown)
    diff = run_json("prototypes", "diff", "gates")
    assert 0.5 < diff["mean"] <= 1
    run("prototypes", "export", "gates", tmp_path / "gates.safetensors")
    file = tmp_path / "gates.safetensors"
    assert all(np.isfinite(vector).all() for vector in load_file(file).values())
    run("compose", "filed", *POOL, "--method", "maple", "--set", f"prototypes={file}")
    run("compose", "kept", *POOL, "--method", "maple", "--set", "prototypes=gates@2")
    prompt = ("What is the capital of France?", "--max-new-tokens", 4)
    assert run("generate", "filed", *prompt).stdout == run("generate", "kept", *prompt).stdout


def test_a_composition_of_phatgoose_is_refined_by_maple(run: Run, run_json: Callable[..., Any]) -> None:
    run("train", "phatgoose", *MEMBERS, *QUICK)
    settings = ("--set", "parent=phatgoose", "--set", "prototypes=phatgoose")
    made = run_json("train", "maple", "--name", "refined", *MEMBERS, *QUICK, *settings)
    assert made["prototypes"] == "refined@1"
    assert run_json("prototypes", "diff", "refined")["parent"] == "phatgoose@1"


def test_data_of_a_file_and_of_a_composition(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    run("compose", "mix", *POOL)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": "Is it?", "output": "yes", "task": name}) + "\n" for name in POOL))
    made = run_json("train", "lora-mixer", "--composition", "mix", "--data", data, *QUICK)
    assert (made["examples"], made["prototypes"]) == (3, "lora-mixer@1")


@pytest.mark.parametrize("kind", ["shared", "ewora"])
def test_one_adapter_for_all_tasks(run: Run, run_json: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "made"
    sizes = ("--set", "r=4", "--set", "lora_alpha=8") + (("--set", "n=2") if kind == "ewora" else ())
    made = run_json("train", kind, "--out", out, *MEMBERS, *QUICK, *sizes)
    assert (made["out"], made["steps"], made["kind"]) == (str(out), 3, kind)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ({"shared": "LORA", "ewora": "EWORA"}[kind], 4)
    assert not list(tmp_path.glob(".made*"))
    if kind == "shared":
        run("sync", out)
        run("compose", "alone", str(out), "--method", "single", "--set", "adapter=made")
    else:
        assert "import hub_router.ewora" in run("sync", out, status=1).stdout
    assert "exists" in run("train", kind, "--out", out, *MEMBERS, *QUICK, status=1).stderr


def test_an_adapter_of_a_file_without_a_catalog(
    run_json: Callable[..., Any], run: Run, world: World, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input": "Is it?", "output": "yes", "task": "any"}) + "\n")
    given = ("--base", world.base, "--data", data, *QUICK)
    assert run_json("train", "shared", "--out", tmp_path / "made", *given, "--set", "r=2")["examples"] == 1
    assert (
        "there are no settings rr of shared"
        in run("train", "shared", "--out", tmp_path / "b", *given, "--set", "rr=2", status=1).stderr
    )
    assert "--out DIR" in run("train", "shared", *given, status=2).stderr


def test_held_out_inputs_are_not_learned(run_json: Callable[..., Any], world: World) -> None:
    """The world's adapters bring 4 equal samples and 2 equal tests each; a sample counts once."""
    planned = run_json("train", "maple", *MEMBERS, "--dry-run")
    assert planned["examples"] == len(POOL)


def test_a_set_serves_the_method_that_made_it(run: Run, tmp_path: Path) -> None:
    for method in ("phatgoose", "maple"):
        run("train", method, *MEMBERS, *QUICK)
    run("prototypes", "export", "phatgoose", tmp_path / "goose@7.safetensors")
    for name in ("phatgoose", tmp_path / "goose@7.safetensors"):
        for method in ("lora-mixer", "maple"):
            errors = run("compose", "x", *POOL, "--method", method, "--set", f"prototypes={name}", status=1).stderr
            assert "was made by 'phatgoose', whose vectors mean nothing to" in errors
    refined = ("--set", "parent=phatgoose", "--set", f"prototypes={tmp_path / 'goose@7.safetensors'}")
    run("train", "maple", "--name", "child", *MEMBERS, *QUICK, *refined)
    assert "train phatgoose first" in run("train", "maple", *MEMBERS, "--set", "parent=phatgoose", status=1).stderr


def test_nothing_is_written_over(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    assert "is left as it is" in run("train", "maple", *MEMBERS, *QUICK, "--log", notes, status=1).stderr
    assert notes.read_text() == "mine\n"
    twice = ("--adapters", "a=colours,b=colours,c=moods")
    assert "a and b" in run("train", "maple", *twice, *QUICK, status=1).stderr


def test_a_dry_run_checks_all_and_trains_nothing(run: Run, run_json: Callable[..., Any], home: Path) -> None:
    planned = run_json("train", "phatgoose", *MEMBERS, *QUICK, "--dry-run")
    assert (planned["prototypes"], planned["version"], planned["steps"]) == (None, None, 9)
    assert planned["steps"] == run_json("train", "phatgoose", *MEMBERS, *QUICK)["steps"]
    one = run_json("train", "maple", *MEMBERS, "--dry-run", "--set", "epochs=3", "--set", "batch_size=2")
    assert one["steps"] == -(-3 * one["examples"] // 2)
    assert "maks" in run("train", "maple", *MEMBERS, "--dry-run", "--set", "maks=1", status=1).stderr
    assert [each["name"] for each in run_json("prototypes", "list")["sets"]] == ["phatgoose"]


def test_bad_lines_are_all_named_and_nothing_is_trained(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    good = json.dumps({"input": "Is it?", "output": "yes", "adapter": "moods"})
    bad = ["not json", "[]", json.dumps({"input": "a", "adapter": "moods"}), json.dumps({"input": "a", "output": "b"})]
    data.write_text("\n".join([good, *bad]) + "\n")
    errors = run("train", "maple", *MEMBERS, "--data", data, status=1).stderr
    assert "4 lines are no examples" in errors
    assert all(f"line {number}:" in errors for number in (2, 3, 4, 5))
    assert "Traceback" not in errors
    assert run("prototypes", "list").stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["train", "maple"], 2, "--composition NAME"),
        (["train", "arrow", *MEMBERS], 1, "'arrow' is not trained; methods that are: phatgoose, maple"),
        (["train", "maple", *MEMBERS, "--set", "maks=none"], 1, "no settings maks"),
        (["train", "maple", *MEMBERS, "--set", "mask=all"], 1, "after or before or none"),
        (["train", "maple", *MEMBERS, "--set", "steps=0"], 1, "steps=0, expected an integer of at least 1"),
        (["train", "maple", *MEMBERS, "--name", "a@b"], 1, "prototype set name"),
        (["train", "maple", *MEMBERS, "--set", "prototypes=nothing"], 1, "nothing"),
        (["train", "lora-mixer", *MEMBERS, "--set", "balance=even"], 1, "balance='even'"),
        (["compose", "raw", *POOL, "--method", "maple"], 1, "hub-router train maple"),
        (["compose", "raw", *POOL, "--method", "maple", "--set", "prototypes=gone"], 1, "gone"),
    ],
)
def test_refusals(run: Run, arguments: list[str], status: int, text: str) -> None:
    assert text in run(*arguments, status=status).stderr


def test_gates_of_other_weights_or_of_fewer_adapters_are_refused(run: Run, world: World, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world.adapters["moods"], moved / "moods")
    run("sync", moved / "moods")
    pool = ("colours", "capitals", str(moved / "moods"))
    run("train", "maple", "--name", "gates", *(part for ref in pool for part in ("--adapters", ref)), *QUICK)
    errors = run("compose", "more", *pool, "sums", "--method", "maple", "--set", "prototypes=gates", status=1).stderr
    assert "'sums' has none" in errors
    run("compose", "mix", *pool, "--method", "maple", "--set", "prototypes=gates")
    shutil.rmtree(moved / "moods")
    save_adapter(world.base, moved / "moods", "moods", seed=9)
    run("sync", moved / "moods")
    errors = run("compose", "again", *pool, "--method", "maple", "--set", "prototypes=gates", status=1).stderr
    assert "was made for other weights of: moods" in errors
    assert "hub-router train" in errors


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_goes_on_and_ends_alike(
    run: Run, run_json: Callable[..., Any], home: Path, tmp_path: Path
) -> None:
    settings = ["--set", "steps=40", "--set", "batch_size=2", "--set", "save_every=2", "--set", "learning_rate=0.01"]
    whole = ["train", "maple", "--name", "whole", *MEMBERS, *settings]
    run(*whole)
    command = ["train", "maple", "--name", "killed", *MEMBERS, *settings, "--home", str(home)]
    process = subprocess.Popen([sys.executable, "-m", "hub_router", *command], stderr=subprocess.PIPE)
    checkpoint = home / "training" / "killed.run" / "training.pt"
    until = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not any(each["name"] == "killed" for each in run_json("prototypes", "list")["sets"])
    assert run_json(*command[:-2])["steps"] == 40
    assert not checkpoint.exists()
    for name in ("whole", "killed"):
        run("prototypes", "export", name, tmp_path / f"{name}.safetensors")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
