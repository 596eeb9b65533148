"""``generate`` and ``eval`` with a real tiny model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from cli_world import TASKS, Run, World

from hub_router.cli.explanation import PALETTE, show_explanation, winners
from hub_router.cli.output import Output

PROMPT = TASKS["colours"][3]


@pytest.fixture
def mix(run: Run) -> str:
    run("compose", "mix", "colours", "capitals", "sums", "--method", "arrow", "--set", "top_k=2")
    return "mix"


def reference(world: World) -> str:
    """The same text by the Python API, from the folders and without the catalog."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hub_router import compose

    routed = compose(
        AutoModelForCausalLM.from_pretrained(world.base),
        {task: world.adapters[task] for task in ("colours", "capitals", "sums")},
        method="arrow",
        tokenizer=AutoTokenizer.from_pretrained(world.base),
        top_k=2,
    )
    return str(routed.generate(PROMPT, max_new_tokens=6, do_sample=False))


def test_text_is_that_of_the_python_api(run: Run, run_json: Callable[..., Any], mix: str, world: World) -> None:
    expected = reference(world)
    assert expected
    assert run("generate", mix, PROMPT, "--max-new-tokens", 6).stdout == expected + "\n"
    document = run_json("generate", mix, PROMPT, "--max-new-tokens", 6)
    assert document == {"composition": mix, "prompt": PROMPT, "text": expected}


def test_prompt_from_stdin(run_json: Callable[..., Any], mix: str) -> None:
    given = run_json("generate", mix, "-", "--max-new-tokens", 3, input=PROMPT + "\n")
    assert given == run_json("generate", mix, PROMPT, "--max-new-tokens", 3)


def test_seed_makes_sampling_repeatable(run_json: Callable[..., Any], mix: str) -> None:
    def sample(seed: int) -> str:
        arguments = ["generate", mix, PROMPT, "--max-new-tokens", 12, "--temperature", 5, "--top-p", 1]
        return run_json(*arguments, "--seed", seed)["text"]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_sampling_needs_a_temperature_above_zero(run: Run, mix: str) -> None:
    assert "--top-p" in run("generate", mix, PROMPT, "--temperature", 0, "--top-p", 0.5, status=2).stderr


def test_explain_json_has_weights_of_every_token(run_json: Callable[..., Any], mix: str) -> None:
    document = run_json("generate", mix, PROMPT, "--max-new-tokens", 4, "--explain")
    assert set(document) == {"composition", "prompt", "text", "tokens", "mean_weights"}
    assert list(document["mean_weights"]) == ["colours", "capitals", "sums"]
    generated = [token for token in document["tokens"] if token["generated"]]
    assert 1 <= len(generated) <= 4
    for token in document["tokens"]:
        assert set(token) == {"text", "generated", "adapter", "weights"}
        assert token["adapter"] == max(token["weights"], key=token["weights"].__getitem__)
        assert sum(token["weights"].values()) == pytest.approx(1, abs=1e-5)
    for name, mean in document["mean_weights"].items():
        column = [token["weights"][name] for token in document["tokens"]]
        assert mean == pytest.approx(sum(column) / len(column), abs=1e-6)


def test_explain_without_colours_numbers_the_tokens(run: Run, run_json: Callable[..., Any], mix: str) -> None:
    arguments = ["generate", mix, PROMPT, "--max-new-tokens", 4, "--explain"]
    shown = run(*arguments).stdout
    assert "\x1b" not in shown
    tokens = run_json(*arguments)["tokens"]
    order = ["colours", "capitals", "sums"]
    expected = [str(order.index(token["adapter"])) for token in tokens if token["text"].strip()]
    prompt_and_answer = shown[: shown.index("\n\n")]
    assert re.findall(r"\[(\d)\]", prompt_and_answer) == expected
    assert re.search(r"#  adapter +tokens won +mean weight", shown)


def test_explain_on_a_terminal_colours_each_token_by_its_winner(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from hub_router.composition.explain import Explanation

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.0, 0.0]])
    explanation = Explanation(("one", " two", "\x1b[2J"), 1, weights, ("first", "second"), " two")
    monkeypatch.delenv("NO_COLOR")
    show_explanation(Output(), explanation)
    shown = capsys.readouterr().out
    first, second = (f"\x1b[38;5;{colour}m" for colour in PALETTE[:2])
    assert f"Prompt: {first}one\x1b[0m\nAnswer: {second}\x1b[1m two\x1b[0m\x1b[1m\\x1b[2J\x1b[0m" in shown
    assert f"Colours: {first}first\x1b[0m  {second}second\x1b[0m" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    show_explanation(Output(), explanation)
    assert "Prompt: one[0]\nAnswer:  two[1]\\x1b[2J\n" in capsys.readouterr().out


def test_winners() -> None:
    assert winners([[0.1, 0.9], [0.0, 0.0], [0.5, 0.5]]) == [1, None, 0]


def test_base_method_wins_no_token(run: Run, run_json: Callable[..., Any]) -> None:
    run("compose", "plain", "colours", "--method", "base")
    document = run_json("generate", "plain", PROMPT, "--max-new-tokens", 2, "--explain")
    assert {token["adapter"] for token in document["tokens"]} == {None}
    assert document["mean_weights"] == {"colours": 0.0}


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["mxi", "x"], 1, "mix"),
        (["mix", ""], 0, ""),
        (["mix", "x", "--device", "warp"], 2, "'warp' cannot be used"),
        (["mix", "x", "--device", "cuda:63"], 2, "'cuda:63' cannot be used"),
    ],
)
def test_refusals(run: Run, mix: str, arguments: list[str], status: int, text: str) -> None:
    done = run("generate", *arguments, "--max-new-tokens", 1, status=status)
    assert text in done.stderr
    assert bool(done.stdout) == (status == 0)


def test_changed_weights_are_not_served(run: Run, mix: str, home: Any) -> None:
    """The composition remembers what it was composed with."""
    import sqlite3

    with sqlite3.connect(home / "catalog.db") as database:
        database.execute("update composition_members set weights_hash = 'other' where name = 'sums'")
    done = run("generate", mix, "x", status=1)
    assert "sums" in done.stderr
    assert "--replace" in done.stderr


def test_eval_scores_every_task_by_every_method(run: Run, run_json: Callable[..., Any], mix: str) -> None:
    document = run_json("eval", mix, "--methods", "base,own,uniform,arrow", "--samples", 1)
    assert set(document) == {"composition", "methods", "rows", "mean", "unseen_mean", "refused", "notes"}
    assert document["unseen_mean"] == document["refused"] == {}
    assert document["methods"] == ["base", "own", "uniform", "arrow"]
    assert [(row["task"], row["samples"]) for row in document["rows"]] == [("colours", 1), ("capitals", 1), ("sums", 1)]
    for method in document["methods"]:
        column = [row["accuracy"][method] for row in document["rows"]]
        assert document["mean"][method] == pytest.approx(sum(column) / 3)
    shown = run("eval", mix, "--methods", "base,own").stdout.splitlines()
    assert shown[0].split() == ["task", "samples", "base", "own"]
    assert [line.split()[0] for line in shown[1:]] == ["colours", "capitals", "sums", "mean"]


def test_eval_of_an_unknown_method_lists_the_known(run: Run, mix: str) -> None:
    assert "arrow" in run("eval", mix, "--methods", "base,aroww", status=1).stderr
