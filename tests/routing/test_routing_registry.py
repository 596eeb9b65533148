"""The registry: names, defaults of the papers, and every wrong hyperparameter named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hub_router.errors import MethodError
from hub_router.routing.arrow import Arrow
from hub_router.routing.registry import METHODS, create, describe, describe_all, hyperparameters_of
from hub_router.routing.spectr import Spectr


def test_names_are_those_of_the_classes() -> None:
    assert list(METHODS) == [
        *("base", "single", "uniform", "merged", "arrow", "spectr"),
        *("retriever", "hilora", "hilora-gs", "hilora-roc", "lego"),
        *("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"),
        *("magnitude_prune", "magnitude_prune_svd", "knots"),
        *("phatgoose", "maple", "lora-mixer", "lorahub", "mole", "xlora", "mixlora"),
    ]
    assert all(METHODS[name].name == name for name in METHODS)


def test_defaults_are_the_papers() -> None:
    assert create("arrow", {}) == Arrow(top_k=4, temperature=1.0)
    assert create("spectr", {}) == Spectr(top_k=4, weights="uniform", merge="outputs")


def test_description_holds_what_a_user_needs() -> None:
    info = describe("arrow")
    assert info.paper == "https://arxiv.org/abs/2405.11157"
    assert [(each.name, each.default, each.required) for each in info.hyperparameters] == [
        ("top_k", 4, False),
        ("temperature", 1.0, False),
    ]
    (adapter,) = describe("single").hyperparameters
    assert adapter.required
    assert [info.name for info in describe_all()] == list(METHODS)
    assert all(info.title and each.help and each.valid for info in describe_all() for each in info.hyperparameters)


def test_settings_give_an_equal_method() -> None:
    method = create("spectr", {"top_k": 2, "merge": "factors"})
    assert hyperparameters_of(method) == {"top_k": 2, "weights": "uniform", "merge": "factors"}
    assert create("spectr", hyperparameters_of(method)) == method


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("arrow", {"top_k": 0}, r"'arrow' cannot use top_k=0, expected an integer of at least 1"),
        ("arrow", {"top_k": True}, r"top_k=True"),
        ("arrow", {"top_k": 2.0}, r"top_k=2.0"),
        ("arrow", {"temperature": -1.0}, r"temperature=-1.0, expected a finite number above 0"),
        ("arrow", {"temperature": 0}, r"temperature=0"),
        ("arrow", {"temperature": float("nan")}, r"temperature=nan"),
        ("arrow", {"temperature": "warm"}, r"temperature='warm'"),
        ("arrow", {"top_k": 0, "temperature": 0}, r"top_k=0.*temperature=0"),
        ("spectr", {"merge": "sum"}, r"merge='sum', expected 'outputs' or 'factors'"),
        ("spectr", {"weights": ["uniform"]}, r"weights=\['uniform'\], expected 'uniform' or 'softmax'"),
        (
            "arrow",
            {"topk": 3},
            r"topk=3 is none of its hyperparameters, did you mean 'top_k'\?.*top_k=4, temperature=1.0",
        ),
        ("base", {"top_k": 3}, r"top_k=3 is none of its hyperparameters; it takes: nothing"),
        ("single", {}, r"adapter is missing, expected a non-empty string"),
        ("single", {"adapter": ""}, r"adapter='', expected a non-empty string"),
        ("single", {"adapter": 3}, r"adapter=3"),
        ("arow", {}, r"no method 'arow'; methods: base, single, .*did you mean 'arrow'"),
    ],
)
def test_wrong_hyperparameters_are_named(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        create(name, given)


def test_methods_are_frozen() -> None:
    with pytest.raises(AttributeError):
        create("arrow", {}).top_k = 1


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(
        MethodError, match=r"topk=3 is none.*temperature=-1.0, expected a finite number above 0; it takes"
    ):
        create("arrow", {"topk": 3, "temperature": -1.0})


@pytest.mark.parametrize("name", [None, 3, ["arrow"]])
def test_method_that_is_no_string_is_refused(name: Any) -> None:
    with pytest.raises(MethodError, match=r"there is no method .*; methods: base"):
        create(name, {})


def test_numpy_values_become_built_in_ones() -> None:
    given = {"top_k": np.int64(2), "temperature": np.float32(0.5)}
    values = hyperparameters_of(create("arrow", given))
    assert [type(each) for each in values.values()] == [int, float]
    assert json.loads(json.dumps(values)) == {"top_k": 2, "temperature": 0.5}


def test_integer_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(MethodError, match="expected a finite number above 0"):
        create("arrow", {"temperature": 10**400})
