"""``report --pool`` on samples of a real catalog."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run

INPUTS = {
    "colours": ["What colour is grass?", "Which colour has the sea?", "Name the colour of snow.", "Is blood red?"],
    "capitals": ["What is the capital of Peru?", "Name Spain's capital city.", "Which city governs Italy?"],
    "moods": ["Is this film review kind?", "Does the critic like the play?", "How did they find the film?"],
}


@pytest.fixture
def pool(run: Run, tmp_path: Path) -> tuple[str, ...]:
    """Three adapters with samples, indexed and composed as ``mix``."""
    for task, inputs in INPUTS.items():
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps({"input": text, "output": "x"}) + "\n" for text in inputs))
        run("samples", "add", task, file)
    run("index")
    run("compose", "mix", *INPUTS)
    return tuple(INPUTS)


def test_report_of_a_composition_and_of_adapters(run_json: Callable[..., Any], run: Run, pool: tuple[str, ...]) -> None:
    found = run_json("report", "mix", "--pool")
    assert found["adapters"] == list(pool)
    assert found["encoder"] == "offline"
    assert found["epsilon"] == found["calibration"]["chosen"]["epsilon"]
    assert found["calibration"]["published"]["epsilon"] == 1e-5
    assert 1 <= found["calibration"]["chosen"]["candidates_seen"] <= 3
    # The world's own sample of each task counts as well.
    assert [task["samples"] for task in found["tasks"]] == [5, 4, 4]
    for key in ("bhattacharyya", "kl"):
        matrix = found[key]
        assert [len(row) for row in matrix] == [3, 3, 3]
        assert [matrix[i][i] for i in range(3)] == [0, 0, 0]
    assert all(task["nearest"] != task["adapter"] for task in found["tasks"])
    assert run_json("report", *pool, "--pool") == found
    other = run_json("report", "mix", "--pool", "--epsilon", 0.01, "--top-k", 1)
    assert (other["epsilon"], other["top_k"], other["calibration"]) == (0.01, 1, found["calibration"])
    assert other["bhattacharyya"] != found["bhattacharyya"]
    done = run("report", "mix", "--pool")
    chosen = f"epsilon={found['epsilon']:g}"
    assert f"{found['epsilon']:g} calibrated" in done.stdout
    assert "1e-05 published" in done.stdout
    assert f"--method hilora --set {chosen}" in done.stderr
    assert f"hub-router eval mix --methods own,hilora,hilora:{chosen} --unseen" in done.stderr


def test_the_advice_can_be_followed(run: Run, run_json: Callable[..., Any], pool: tuple[str, ...]) -> None:
    epsilon = run_json("report", "mix", "--pool")["epsilon"]
    run("compose", "likely", *pool, "--method", "hilora", "--set", f"epsilon={epsilon:g}")
    column = f"hilora:epsilon={epsilon:g}"
    table = run_json("eval", "mix", "--methods", f"own,hilora,{column}", "--unseen", "--samples", 1)
    assert set(table["unseen_mean"]) == {"hilora", column}
    assert table["mean"][column] == run_json("eval", "likely", "--methods", "hilora", "--samples", 1)["mean"]["hilora"]


def test_too_few_samples_are_all_named(run: Run) -> None:
    errors = run("report", "colours", "sums", "--pool", status=1).stderr
    assert "'colours' has 1, 'sums' has 1" in errors
    assert "hub-router samples add" in errors


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["mix"], 2, "--pool"),
        (["--pool"], 2, "NAME|ADAPTER"),
        (["mix", "--pool", "--epsilon", "0"], 2, "--epsilon"),
        (["mix", "--pool", "--top-k", "0"], 2, "--top-k"),
        (["mixx", "--pool"], 1, "mixx"),
        (["colours", "--pool"], 1, "a single NAME is a composition"),
        (["colours", "colour", "--pool"], 1, "colours"),
    ],
)
def test_refusals(run: Run, arguments: list[str], status: int, text: str) -> None:
    done = run("report", *arguments, status=status)
    assert done.stdout == ""
    assert text in done.stderr
