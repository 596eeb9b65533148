"""``compose`` and ``compositions``: what is stored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cli_world import Run, World


def test_compose_stores_what_was_asked(run_json: Callable[..., Any], world: World) -> None:
    document = run_json(
        "compose", "mix", "colours", world.adapters["sums"], "--method", "arrow", "--set", "top_k=1",
        "--set", "temperature=0.5",
    )  # fmt: skip
    composition = document["composition"]
    assert set(composition) == {"name", "base_model", "method", "hyperparameters", "members"}
    assert composition["name"] == "mix"
    assert composition["method"] == "arrow"
    assert composition["hyperparameters"] == {"top_k": 1, "temperature": 0.5}
    assert composition["base_model"] == str(world.base)
    assert [member["name"] for member in composition["members"]] == ["colours", "sums"]
    assert run_json("compositions") == {"compositions": [composition]}


def test_labels_keep_their_order_and_mix_with_plain_names(run_json: Callable[..., Any], world: World) -> None:
    document = run_json("compose", "mix", f"b={world.adapters['sums']}", "a=colours", "moods")
    assert [member["name"] for member in document["composition"]["members"]] == ["b", "a", "moods"]


def test_query_adds_what_search_finds_once(run_json: Callable[..., Any]) -> None:
    document = run_json("compose", "found", "moods", "--query", "is this film review positive?", "--limit", 2)
    names = [member["name"] for member in document["composition"]["members"]]
    assert names[0] == "moods"
    assert len(names) == len(set(names)) == 2


def test_text_output_names_the_next_command(run: Run) -> None:
    done = run("compose", "two words", "colours", "--method", "uniform")
    assert "Stored two words: uniform" in done.stdout
    assert "hub-router generate 'two words'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["colours", "--method", "arow"], ["arow", "arrow", "spectr"]),
        (["colours", "--set", "topk=2"], ["topk", "top_k"]),
        (["colours", "--set", "top_k=0"], ["top_k", "0", "at least 1"]),
        (["colours", "--set", "top_k=four"], ["'four'", "integer"]),
        (["colour"], ["colours"]),
        (["colours", "colours"], ["colours", "twice"]),
        (["colours", "capitals", "--method", "merged"], ["rank"]),
    ],
)
def test_refusals_are_one_message_and_store_nothing(
    run: Run, run_json: Callable[..., Any], arguments: list[str], texts: list[str]
) -> None:
    done = run("compose", "bad", *arguments, status=1)
    assert done.stdout == ""
    for text in texts:
        assert text in done.stderr, done.stderr
    assert run_json("compositions") == {"compositions": []}


def test_two_adapters_of_one_label_are_wrong_usage(run: Run) -> None:
    assert "LABEL=ADAPTER" in run("compose", "bad", "a=colours", "a=sums", status=2).stderr


def test_base_model_that_does_not_fit_lists_every_mismatch(run: Run, world: World, tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(world.base)
    config.hidden_size, config.num_hidden_layers = 16, 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    done = run("compose", "bad", "colours", "--base-model", tmp_path / "small", status=1)
    # 4 layers with q and v each: two layers have other widths, two do not exist.
    assert sum(line.startswith("  - ") for line in done.stderr.splitlines()) == 8


def test_a_taken_name_needs_replace(run: Run, run_json: Callable[..., Any]) -> None:
    run("compose", "mix", "colours")
    assert "--replace" in run("compose", "mix", "sums", status=1).stderr
    run("compose", "mix", "sums", "--replace")
    [stored] = run_json("compositions")["compositions"]
    assert [member["name"] for member in stored["members"]] == ["sums"]


def test_delete(run: Run, run_json: Callable[..., Any]) -> None:
    run("compose", "mix", "colours")
    assert run_json("compositions", "--delete", "mix") == {"deleted": "mix"}
    assert run_json("compositions") == {"compositions": []}
    assert "mix" in run("compositions", "--delete", "mix", status=1).stderr
    assert len(run_json("list")["adapters"]) == 4


def test_table_and_the_empty_remark(run: Run) -> None:
    assert "hub-router compose" in run("compositions").stderr
    run("compose", "mix", "colours", "sums", "--set", "top_k=1")
    assert "mix   arrow(top_k=1)" in run("compositions").stdout
