"""``search``, ``index`` and ``methods``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import TASKS, Run, save_adapter

from hub_router.errors import HubRouterError
from hub_router.hub import Hub


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_found_by_its_own_question(run_json: Callable[..., Any], task: str) -> None:
    document = run_json("search", TASKS[task][3])
    assert set(document) == {"text", "by", "hits"}
    assert document["by"] == "cosine"
    best = document["hits"][0]
    assert set(best) == {"adapter", "score", "kind", "matched"}
    assert best["adapter"]["name"] == task
    assert best["matched"] == TASKS[task][3]
    assert best["score"] == pytest.approx(1, abs=1e-3)  # the sample is the question itself
    scores = [hit["score"] for hit in document["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len(TASKS)


def test_search_filters_and_limit(run_json: Callable[..., Any]) -> None:
    question = TASKS["capitals"][3]
    assert [hit["adapter"]["name"] for hit in run_json("search", question, "--licence", "unknown")["hits"]] == ["sums"]
    assert len(run_json("search", question, "--limit", 2)["hits"]) == 2


def test_search_table_says_why(run: Run) -> None:
    lines = run("search", TASKS["sums"][3]).stdout.splitlines()
    assert lines[0].split() == ["#", "adapter", "score", "base", "model", "ranks", "licence", "why"]
    assert "sample: How much is two plus two?" in lines[1]


def test_search_without_a_match_says_where_to_look(run: Run) -> None:
    done = run("search", "anything", "--tag", "none-has-it")
    assert done.stdout == ""
    assert "hub-router list" in done.stderr


INPUTS = {
    "capitals": [f"What is the capital of {place}?" for place in ("Spain", "Norway", "Peru", "Kenya", "Japan")],
    "sums": [f"How much is {what}?" for what in ("one plus six", "two plus four", "five plus nine", "ten plus ten")],
}


@pytest.fixture
def sampled(run: Run, tmp_path: Path) -> None:
    """Two of the adapters with samples that differ, which a likelihood needs."""
    for task, inputs in INPUTS.items():
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
        run("samples", "add", task, file)
    assert json.loads(run("index", "--json").stdout)["gaussians"] == 2


@pytest.mark.usefixtures("sampled")
def test_search_by_likelihood(run: Run, run_json: Callable[..., Any]) -> None:
    for task, text in (("capitals", "What is the capital of Chile?"), ("sums", "How much is seven plus eight?")):
        document = run_json("search", text, "--by", "likelihood")
        best, other = document["hits"]
        assert (document["by"], best["adapter"]["name"], best["kind"]) == ("likelihood", task, "sample")
        assert best["matched"] in INPUTS[task] + [TASKS[task][3]]
        assert best["score"] > other["score"]
        assert best["score"] < 0
    (unlicensed,) = run_json("search", text, "--by", "likelihood", "--licence", "unknown")["hits"]
    assert unlicensed["adapter"]["name"] == "sums"
    wide = run_json("search", text, "--by", "likelihood", "--epsilon", "0.01", "--limit", 1)["hits"]
    assert wide[0]["score"] > 0 > best["score"]
    assert "How much is" in run("search", text, "--by", "likelihood").stdout


def test_search_by_likelihood_names_what_is_missing(run: Run) -> None:
    """One sample each, as the world has them, gives no likelihood."""
    done = run("search", "x", "--by", "likelihood", status=1)
    assert "hub-router samples add ADAPTER FILE" in done.stderr
    for wrong in (["--epsilon", "0.1"], ["--by", "likelihood", "--epsilon", "0"], ["--by", "length"]):
        assert wrong[-2] in run("search", "x", *wrong, status=2).stderr


@pytest.mark.parametrize("wrong", [{"by": "length"}, {"epsilon": 0.1}, {"by": "likelihood", "epsilon": 0.0}])
def test_hub_refuses_another_score_and_an_epsilon_without_one(home: Path, wrong: dict[str, Any]) -> None:
    with Hub(home) as hub, pytest.raises(HubRouterError, match=r"--by NAME|--epsilon E"):
        hub.search("x", **wrong)


def test_search_before_index_names_it(run: Run, tmp_path: Any) -> None:
    done = run("search", "x", "--encoder", "offline", "--database-url", f"sqlite:///{tmp_path / 'new.db'}", status=1)
    assert "hub-router index" in done.stderr


def test_empty_text_is_refused(run: Run) -> None:
    assert "empty" in run("search", "  ", status=1).stderr


def test_index_computes_only_what_is_new(run: Run, run_json: Callable[..., Any], world: Any, tmp_path: Any) -> None:
    document = run_json("index")
    assert set(document) == {"spectra", "embedded", "gaussians", "unchanged", "encoder", "failed"}
    assert (document["spectra"], document["embedded"], document["unchanged"], document["failed"]) == (0, 0, 4, [])
    assert document["gaussians"] == 0
    save_adapter(world.base, tmp_path / "more", "colours", seed=9)
    run("sync", tmp_path / "more")
    again = run_json("index")
    assert (again["spectra"], again["embedded"], again["gaussians"]) == (1, 1, 1)


def test_index_reports_an_adapter_whose_file_is_gone(run: Run, world: Any, tmp_path: Any) -> None:
    save_adapter(world.base, tmp_path / "gone", "colours", seed=9)
    run("sync", tmp_path / "gone")
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    done = run("index", status=1)
    assert "gone" in done.stdout


def test_index_of_an_empty_catalog_says_how_to_fill_it(run: Run, tmp_path: Any) -> None:
    done = run("index", "--encoder", "offline", "--database-url", f"sqlite:///{tmp_path / 'new.db'}")
    assert "hub-router sync" in done.stderr


def test_index_with_an_encoder_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("index", "--encoder", "/no/such/encoder", status=1)
    assert "--encoder" in done.stderr


def test_methods_lists_all_with_their_hyperparameters(run: Run, run_json: Callable[..., Any]) -> None:
    by_name = {method["name"]: method for method in run_json("methods")["methods"]}
    assert {"base", "single", "uniform", "merged", "arrow", "spectr"} <= set(by_name)
    assert set(by_name["arrow"]) == {"name", "title", "paper", "hyperparameters"}
    defaults = {each["name"]: each["default"] for each in by_name["arrow"]["hyperparameters"]}
    assert defaults == {"top_k": 4, "temperature": 1.0}
    shown = run("methods").stdout
    assert "top_k=4, temperature=1.0" in shown
    assert "https://arxiv.org/abs/2405.11157" in shown
