"""``bases``: overrides by adapter and by rule, in force at once, withdrawn again, and what commands say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import TASKS, Run, World

Json = Callable[..., Any]


@pytest.fixture
def liar(world: World, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama that calls itself one of GPT-2."""
    folder = Path(shutil.copytree(world.adapters["moods"], tmp_path / "liar"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gpt2"}))
    (folder / "README.md").unlink()
    return folder


def base_of(run_json: Json, name: str) -> tuple[str, str]:
    adapter = run_json("show", name)["adapter"]
    return adapter["base_model_resolved"], adapter["base_model_confidence"]


def test_folder_that_an_adapter_was_trained_on_is_certain(run_json: Json, run: Run, world: World) -> None:
    adapter = run_json("show", "moods")["adapter"]
    assert (adapter["base_model_resolved"], adapter["base_model_confidence"]) == (str(world.base), "certain")
    assert adapter["base_model_evidence"][-1] == f"its tensors fit the architecture of {world.base}"
    shown = " ".join(run("show", "moods").stdout.split())
    assert f"base model {world.base} (certain: config: base_model_name_or_path" in shown


def test_set_and_unset(run: Run, run_json: Json, world: World) -> None:
    before = run_json("show", "moods")["adapter"]
    document = run_json("bases", "set", "moods", "mistralai/Mistral-7B-v0.1")
    assert document == {"adapter": str(world.adapters["moods"]), "base_model": "mistralai/Mistral-7B-v0.1"}
    assert base_of(run_json, "moods") == ("mistralai/Mistral-7B-v0.1", "certain")
    assert "(certain: set by the user)" in run("show", "moods").stdout
    # Spellings of the filter that stand for the same model.
    for spelling in ("mistralai/mistral-7b-v0.1", "unsloth/mistral-7b-bnb-4bit"):
        assert [entry["name"] for entry in run_json("list", "--base-model", spelling)["adapters"]] == ["moods"]
    run("sync", world.adapters["moods"])
    (choice,) = run_json("bases", "list")["choices"]
    assert choice == {
        "kind": "adapter",
        "pattern": str(world.adapters["moods"]),
        "base_model": "mistralai/Mistral-7B-v0.1",
        "adapters": 1,
    }
    assert "adapter  " in run("bases", "list").stdout
    assert run_json("bases", "unset", "moods")["removed"] == choice
    assert run_json("show", "moods")["adapter"] == before
    assert "hub-router bases set" in run("bases", "list").stderr


def test_rule_decides_for_all_that_state_the_same(run: Run, run_json: Json, world: World) -> None:
    rule = f"*/{world.base.name.upper()}"
    assert run_json("bases", "rule", rule, "gpt2")["rule"]["adapters"] == len(TASKS)
    assert base_of(run_json, "sums") == ("openai-community/gpt2", "certain")
    run("bases", "set", "sums", world.base)
    assert base_of(run_json, "sums") == (str(world.base), "certain")
    assert {entry["kind"]: entry["adapters"] for entry in run_json("bases", "list")["choices"]} == {
        "adapter": 1,
        "rule": len(TASKS) - 1,
    }
    assert "(1 adapter)" in run("bases", "unset", "sums").stdout
    assert base_of(run_json, "sums") == ("openai-community/gpt2", "certain")
    assert f"({len(TASKS)} adapters)" in run("bases", "unset", rule).stdout
    assert base_of(run_json, "sums") == (str(world.base), "certain")


def test_lie_is_shown_refused_and_put_right(run: Run, run_json: Json, world: World, liar: Path) -> None:
    run("sync", liar)
    assert base_of(run_json, "liar") == ("openai-community/gpt2", "contradicted")
    listed = run("list", "--base-model", "gpt2").stdout
    assert "openai-community/gpt2 (contradicted)" in listed
    refused = run("compose", "pool", "liar", "moods", status=1).stderr
    assert "liar: openai-community/gpt2 (config: base_model_name_or_path 'gpt2'" in refused
    assert "k_proj, o_proj, q_proj, v_proj do not exist in a GPT-2 model" in refused
    assert "hub-router bases set" in refused
    run("bases", "set", "liar", world.base)
    assert run_json("compose", "pool", "liar", "moods")["composition"]["base_model"] == str(world.base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "moods", "no-such-model"], "neither owner/name of a model on the Hub nor an existing folder"),
        (["set", "moods", "."], "is a folder without config.json"),
        (["set", "mood", "a/b"], "closest: "),
        (["rule", " ", "a/b"], "the pattern is empty"),
        (["rule", "*", "../nowhere/x"], "neither owner/name"),
        (["unset", "moods"], "no base model was set for 'moods'"),
    ],
)
def test_what_is_refused(run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert message in run("bases", *arguments, status=1).stderr


def test_unset_of_a_misspelt_rule_names_the_nearest(run: Run) -> None:
    run("bases", "rule", "*/my-llama*", "a/b")
    assert "closest: */my-llama*" in run("bases", "unset", "*/my-lama*", status=1).stderr


def test_unset_of_an_adapter_whose_files_are_gone(run: Run, run_json: Json, liar: Path) -> None:
    run("sync", liar)
    run("bases", "set", "liar", "a/b")
    shutil.rmtree(liar)
    run("bases", "unset", "liar")
    assert base_of(run_json, "liar") == ("openai-community/gpt2", "high")
