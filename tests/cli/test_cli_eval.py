"""``eval`` over pools that do not allow every method, and without each task's own adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World, save_adapter

POOL = ("colours", "capitals", "moods")


@pytest.fixture
def mix(run: Run) -> str:
    run("compose", "mix", *POOL, "--method", "arrow", "--set", "top_k=2")
    return "mix"


def test_unseen_leaves_out_each_tasks_own_adapter(run_json: Callable[..., Any], run: Run, mix: str) -> None:
    """With a pool of two, what is left is the other adapter alone."""
    run("compose", "two", "colours", "capitals", "--method", "uniform")
    unseen = run_json("eval", "two", "--methods", "own,uniform", "--unseen", "--tasks", "capitals", "--samples", 1)
    [row] = unseen["rows"]
    assert (row["task"], set(row["accuracy"]), set(row["unseen"])) == ("capitals", {"own", "uniform"}, {"uniform"})
    other = run_json("eval", "two", "--methods", "single:adapter=colours", "--tasks", "capitals", "--samples", 1)
    assert row["unseen"]["uniform"] == other["mean"]["single:adapter=colours"]
    shown = run("eval", mix, "--methods", "own,arrow:top_k=1", "--unseen", "--samples", 1).stdout.splitlines()
    assert [line.split()[0] for line in shown if line] == [
        *("Each", "task", *POOL, "mean"),
        *("Each", "task", *POOL, "mean"),
    ]
    assert shown[1].split() == ["task", "samples", "own", "arrow:top_k=1"]
    assert "-" in shown[-1].split()[2]


def test_all_runs_what_the_pool_allows_and_says_why_not_the_rest(
    run_json: Callable[..., Any], run: Run, mix: str
) -> None:
    # The ranks differ, and every adapter has one sample.
    table = run_json("eval", mix, "--methods", "all", "--unseen", "--samples", 1, "--tasks", "moods")
    assert {"base", "own", "arrow", "retriever", "lego", "ties_svd"} <= set(table["mean"])
    assert set(table["refused"]) == set(table["methods"]) - set(table["mean"])
    assert {"merged", "ties", "hilora"} <= set(table["refused"])
    assert "capitals (1)" in table["refused"]["hilora"]
    assert set(table["unseen_mean"]) == set(table["mean"]) - {"own"}
    lines = run("eval", mix, "--methods", "all", "--tasks", "moods").stdout.splitlines()
    assert lines[0] == "Mean accuracy (tasks: 1, samples: 1):"
    assert next(line for line in lines if line.startswith("merged ")).split() == ["merged", "-"]
    assert any(line.startswith("Not run: hilora, hilora-gs (lacks what it needs: it compares") for line in lines)
    assert any(line.startswith("Not run: merged, linear, ties, ") for line in lines)


def test_a_method_that_is_named_is_not_left_out(run: Run, mix: str) -> None:
    errors = run("eval", mix, "--methods", "all,merged", status=1).stderr
    assert "'capitals' rank 8" in errors
    assert "'hilora'" not in errors


def test_what_is_lacking_is_one_error_and_nothing_is_loaded(run: Run, world: World, tmp_path: Path) -> None:
    """An adapter without samples, others with too few, ranks that differ; and no weights that could be loaded."""
    save_adapter(world.base, tmp_path / "bare", "sums")
    (tmp_path / "bare" / "samples.jsonl").unlink()
    run("sync", tmp_path / "bare")
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    for method, settings in (("hilora", ()), ("retriever", ("--set", "mode=fusion"))):
        errors = run(
            "compose", "bad", "bare", *POOL, "--method", method, *settings, "--base-model", base, status=1
        ).stderr
        assert f"method {method!r}" in errors
        assert "fewer of: bare (0)" in errors
        assert "hub-router samples add" in errors
        assert ("colours (1), capitals (1), moods (1)" in errors) == (method == "hilora")
        assert ("'capitals' rank 8" in errors) == (method == "retriever")
    run("compose", "good", "bare", *POOL, "--base-model", base)
    errors = run("eval", "good", "--methods", "base,hilora,retriever,ties", status=1).stderr
    assert errors.count("fewer of: bare (0)") == 2
    assert "'capitals' rank 8" in errors
    assert "model.safetensors" not in errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--methods", "arrow:top_k"], "METHOD:KEY=VALUE"),
        (["--methods", "arrow:topk=1"], "top_k"),
        (["--methods", "own", "--unseen"], "own, single"),
        (["--tasks", "moods,sums"], "no members 'sums'"),
    ],
)
def test_refusals(run: Run, mix: str, arguments: list[str], text: str) -> None:
    done = run("eval", mix, *arguments, status=1)
    assert done.stdout == ""
    assert text in done.stderr
