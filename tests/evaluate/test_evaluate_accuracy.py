"""Scores by hand, and answers that do not depend on how prompts are batched."""

from __future__ import annotations

import json

import pytest

from hub_router import RoutedModel, compose
from hub_router.composition.base_model import load_base
from hub_router.errors import HubRouterError
from hub_router.evaluate.accuracy import answer, answer_budget, exact_match
from hub_router.records import Sample
from hub_router.settings import bundled

ZOO = bundled("zoo") / "hub_router"


def samples(task: str, count: int) -> list[Sample]:
    lines = (ZOO / task / "test.jsonl").read_text().splitlines()[:count]
    return [Sample(**json.loads(line), split="test") for line in lines]


@pytest.fixture(scope="module")
def routed() -> RoutedModel:
    model, tokenizer = load_base(str(ZOO / "zoo-base"))
    return compose(model, [ZOO / "zoo-film", ZOO / "zoo-plural"], "arrow", tokenizer=tokenizer)


def test_exact_match_counts_equal_answers_white_space_aside() -> None:
    assert exact_match([" yes", "no\n", "maybe", "Yes"], ["yes", "no", "may be", "yes"]) == 0.5
    with pytest.raises(HubRouterError, match="no samples"):
        exact_match([], [])


def test_answers_come_in_the_order_of_the_prompts(routed: RoutedModel) -> None:
    mixed = [sample for pair in zip(samples("zoo-film", 5), samples("zoo-plural", 5), strict=True) for sample in pair]
    prompts = [sample.input for sample in mixed]
    done: list[int] = []
    batched = answer(routed, prompts, max_new_tokens=6, batch_size=3, advance=done.append)
    assert batched == [routed.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    assert sum(done) == len(prompts)


def test_the_budget_fits_the_longest_answer_and_its_end(routed: RoutedModel) -> None:
    texts = ["yes", "a considerably longer answer"]
    longest = max(len(routed.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert answer_budget(routed, [Sample("q", text) for text in texts]) == longest + 1
