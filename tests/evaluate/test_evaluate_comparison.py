"""Comparisons over three adapters of the zoo: seen, unseen, and what is refused before a model is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hub_router import compose
from hub_router.composition.base_model import load_base
from hub_router.errors import HubRouterError, MethodError
from hub_router.evaluate.columns import Column, read_columns
from hub_router.evaluate.comparison import Remembering, compare, refusals
from hub_router.features import PoolFeatures
from hub_router.gaussian import Gaussian, fit
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.reader import read_adapter
from hub_router.records import Sample
from hub_router.routing.registry import METHODS
from hub_router.settings import bundled

ZOO = bundled("zoo") / "hub_router"
NAMES = ("zoo-film", "zoo-plural", "zoo-hotel")


def samples(task: str, count: int) -> list[Sample]:
    lines = (ZOO / task / "test.jsonl").read_text().splitlines()[:count]
    return [Sample(**json.loads(line), split="test") for line in lines]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base(str(ZOO / "zoo-base"))


@pytest.fixture(scope="module")
def pool() -> list[LoraAdapter]:
    return [read_adapter(ZOO / name, name) for name in NAMES]


def gaussians(**counts: int) -> dict[str, Gaussian]:
    generator = np.random.default_rng(0)
    return {f"zoo-{name}": fit(generator.normal(size=(count, 8))) for name, count in counts.items()}


def test_seen_has_the_own_adapter_and_unseen_has_not(base: tuple[Any, Any], pool: list[LoraAdapter]) -> None:
    model, tokenizer = base
    tasks = {"zoo-film": samples("zoo-film", 16), "zoo-plural": samples("zoo-plural", 16), "zoo-hotel": []}
    columns = [Column("base", "base"), Column("own", "own"), Column("k1", "arrow", {"top_k": 1})]
    table = compare(model, tokenizer, pool, tasks, columns, unseen=True)
    assert table.methods == ("base", "own", "k1")
    assert [(row.task, row.samples) for row in table.rows] == [("zoo-film", 16), ("zoo-plural", 16)]
    for row in table.rows:
        assert set(row.accuracy) == {"base", "own", "k1"}
        assert set(row.unseen) == {"base", "k1"}  # the oracle is nothing without its adapter
        assert row.unseen["base"] == row.accuracy["base"]
        for column, members in ((row.accuracy, NAMES), (row.unseen, [name for name in NAMES if name != row.task])):
            routed = compose(model, [ZOO / name for name in members], "arrow", tokenizer=tokenizer, top_k=1)
            answers = [routed.generate(each.input, max_new_tokens=12) for each in tasks[row.task]]
            routed.detach()
            right = sum(got.strip() == want.output.strip() for got, want in zip(answers, tasks[row.task], strict=True))
            assert column["k1"] == right / 16
    assert table.mean["k1"] > table.unseen_mean["k1"] + 0.1
    assert set(table.unseen_mean) == {"base", "k1"}


def test_a_comparison_leaves_the_base_model_as_it_was(base: tuple[Any, Any], pool: list[LoraAdapter]) -> None:
    model, tokenizer = base
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, tokenizer, pool, {"zoo-film": samples("zoo-film", 2)}, [Column("arrow", "arrow")], unseen=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_scored_is_refused(base: tuple[Any, Any], pool: list[LoraAdapter]) -> None:
    film = {"zoo-film": samples("zoo-film", 1)}
    column = [Column("base", "base")]
    with pytest.raises(MethodError, match="zoo-where"):
        compare(*base, pool, {"zoo-where": samples("zoo-where", 1)}, column)
    with pytest.raises(HubRouterError, match="no samples"):
        compare(*base, pool, {"zoo-film": []}, column)
    with pytest.raises(MethodError, match="all of the pool"):
        compare(*base, pool[:1], film, column, unseen=True)
    with pytest.raises(MethodError, match="says nothing of own, single"):
        compare(*base, pool, film, [Column("own", "own")], unseen=True)


def test_refusals_name_everything_that_is_lacking(pool: list[LoraAdapter]) -> None:
    features = PoolFeatures(gaussians=gaussians(film=3, hotel=1), encoder="offline")
    columns = [
        *read_columns(["base", "own", "ties", "retriever", "hilora"], {}),
        Column("fused", "retriever", {"mode": "fusion"}),
    ]
    found = refusals(pool, columns, features)
    assert set(found) == {"ties", "retriever", "hilora", "fused"}
    assert "'zoo-hotel' rank 16" in found["ties"]
    assert "at least 1 different ones, and has fewer of: zoo-plural (0);" in found["retriever"]
    assert "at least 2 different ones, and has fewer of: zoo-plural (0), zoo-hotel (1);" in found["hilora"]
    assert "'zoo-hotel' rank 16" in found["fused"]
    assert "fewer of: zoo-plural (0);" in found["fused"]
    whole = PoolFeatures(gaussians=gaussians(film=2, plural=2, hotel=2), encoder="offline")
    assert set(refusals(pool, columns, whole)) == {"ties", "fused"}
    missing = refusals(pool, columns, PoolFeatures(gaussians=whole.gaussians, encoder="./no-encoder"))
    assert "sentence encoder './no-encoder' cannot be loaded" in missing["hilora"]


def test_columns_carry_settings() -> None:
    names = ["own", "hilora", "hilora:epsilon=2e-4:seed=3", "arrow", "retriever:mode=selection", "arrow"]
    columns = read_columns(names, {"arrow": {"top_k": 2}})
    assert [(each.title, each.method, dict(each.hyperparameters)) for each in columns] == [
        ("own", "own", {}),
        ("hilora", "hilora", {}),
        ("hilora:epsilon=2e-4:seed=3", "hilora", {"epsilon": 2e-4, "seed": 3}),
        ("arrow", "arrow", {"top_k": 2}),
        ("retriever:mode=selection", "retriever", {"mode": "selection"}),
    ]


def test_all_stands_for_every_method_that_needs_no_setting() -> None:
    columns = read_columns(["all", "ties", "arrow:top_k=1"], {})
    titles = [each.title for each in columns]
    told = ("base", "single", "phatgoose", "maple", "lora-mixer", "lorahub", "mole", "xlora", "mixlora")
    assert titles == ["base", "own", *(name for name in METHODS if name not in told), "arrow:top_k=1"]
    # What was named as well must not be left out in silence.
    assert [each.title for each in columns if each.asked] == ["ties", "arrow:top_k=1"]
    assert "single" in [each.title for each in read_columns(["all"], {"single": {"adapter": "a"}})]
    assert "maple" in [each.title for each in read_columns(["all"], {"maple": {"prototypes": "gates"}})]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arow", "arrow"),
        ("arrow:topk=2", "top_k"),
        ("arrow:top_k=0", "at least 1"),
        ("arrow:top_k", "METHOD:KEY=VALUE"),
        ("arrow:top_k=1:top_k=2", "each key once"),
        ("own:top_k=1", "METHOD:KEY=VALUE"),
        ("single", "adapter"),
    ],
)
def test_wrong_columns_say_how(name: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        read_columns(["base", name], {})


def test_no_text_is_embedded_twice() -> None:
    class Counting:
        name = "counting"
        asked: list[str] = []  # noqa: RUF012

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            self.asked += texts
            return np.array([[len(text), 1.0] for text in texts])

    encoder = Remembering(Counting())
    first = encoder.encode(["a", "bb", "a"])
    again = encoder.encode(["bb", "ccc"])
    assert encoder.name == "counting"
    assert Counting.asked == ["a", "bb", "ccc"]
    assert first.tolist() == [[1, 1], [2, 1], [1, 1]]
    assert again.tolist() == [[2, 1], [3, 1]]
