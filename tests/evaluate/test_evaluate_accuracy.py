"""Scores by hand, and answers that do not depend on how prompts are batched."""

from __future__ import annotations

import json

import pytest

from hub_router import RoutedModel, compose
from hub_router.composition.base_model import load_base
from hub_router.errors import HubRouterError, MethodError
from hub_router.evaluate.accuracy import answer, answer_budget, exact_match
from hub_router.evaluate.comparison import compare
from hub_router.lora.reader import read_adapter
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


def test_a_comparison_leaves_the_base_model_as_it_was() -> None:
    model, tokenizer = load_base(str(ZOO / "zoo-base"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pool = [read_adapter(ZOO / name, name) for name in ("zoo-film", "zoo-plural")]
    tasks = {"zoo-film": samples("zoo-film", 8), "zoo-plural": []}
    table = compare(model, tokenizer, pool, tasks, {"base": ("base", {}), "k1": ("arrow", {"top_k": 1})})
    assert table.methods == ("base", "k1")
    assert [row.task for row in table.rows] == ["zoo-film"]
    assert table.mean["k1"] == table.rows[0].accuracy["k1"] > table.mean["base"]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(MethodError, match="zoo-where"):
        compare(model, tokenizer, pool, {"zoo-where": samples("zoo-where", 1)}, {"base": ("base", {})})
    with pytest.raises(HubRouterError, match="no samples"):
        compare(model, tokenizer, pool, {"zoo-film": []}, {"base": ("base", {})})
