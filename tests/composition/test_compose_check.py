"""check_fit: every mismatch of every adapter, with names that help."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compose_models import llama
from torch import nn

from hub_router.composition.architecture import empty_model
from hub_router.composition.check import check_fit
from hub_router.errors import IncompatibleAdaptersError, MissingError
from hub_router.lora.adapter import LoraAdapter, LoraFactors


def adapter(name: str, *modules: str, width: int = 32) -> LoraAdapter:
    factors = LoraFactors(torch.zeros(2, width), torch.zeros(width, 2), 1.0)
    return LoraAdapter(name, None, None, dict.fromkeys(modules, factors), name)


def mismatches(model: nn.Module, *adapters: LoraAdapter) -> tuple[str, ...]:
    with pytest.raises(IncompatibleAdaptersError) as caught:
        check_fit(model, "the base", adapters)
    assert "the base" in str(caught.value)
    return caught.value.mismatches


def test_what_fits_passes() -> None:
    check_fit(llama(), "", [adapter("a", "model.layers.0.self_attn.q_proj"), adapter("b")])


def test_each_kind_of_misfit_has_its_line() -> None:
    lines = mismatches(
        llama(),
        adapter("a", "model.layers.7.self_attn.q_proj", "model.embed_tokens"),
        adapter("b", "model.layers.0.mlp.up_proj", "transformer.h.1.self_attn.v_proj"),
    )
    missing = "the model has no such module; the nearest are"
    assert len(lines) == 4
    assert lines[0].startswith(
        f"adapter 'a', module model.layers.7.self_attn.q_proj: {missing} model.layers.1.self_attn.q_proj, "
    )
    assert lines[1] == (
        "adapter 'a', module model.embed_tokens: got D_in x D_out 32 x 32, expected 300 x 32 as in the model"
    )
    assert lines[2] == (
        "adapter 'b', module model.layers.0.mlp.up_proj: got D_in x D_out 32 x 32, expected 32 x 48 as in the model"
    )
    assert lines[3].startswith(
        f"adapter 'b', module transformer.h.1.self_attn.v_proj: {missing} model.layers.1.self_attn.v_proj, "
    )


def test_a_name_like_no_other_has_no_nearest() -> None:
    assert mismatches(llama(), adapter("a", "zzz"))[0].endswith("the nearest are none")


def test_linear_maps_that_cannot_be_adapted() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "packed": nn.Linear(32, 32)})
    model["packed"].weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    lines = mismatches(model, adapter("a", "attention.out_proj", "packed"))
    assert "output map of a torch.nn.MultiheadAttention" in lines[0]
    assert "weight is torch.int8, expected a floating-point base model" in lines[1]


def test_thousands_of_misfits_are_listed_quickly() -> None:
    layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2) for name in "qkvogud"}) for _ in range(80))
    wrong = [
        adapter(str(e), *(f"model.layers.{i}.attn.{n}_proj" for i in range(80) for n in "qkvogud")) for e in range(8)
    ]
    start = time.perf_counter()
    assert len(mismatches(nn.ModuleDict({"layers": layers}), *wrong)) == 8 * 80 * 7
    assert time.perf_counter() - start < 2


def test_empty_model_has_the_shapes_and_no_weights(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in llama().named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected


def test_empty_model_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be loaded"):
        empty_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("base", "named", "warns"),
    [
        ("org/model", "org/other", True),
        ("org/model", "Org/Model", False),
        ("org/model", None, False),
        ("org/model", "a/local/folder", False),
        ("/a/folder", "org/other", False),
    ],
)
def test_adapters_of_another_base_are_warned_of_in_one_line(
    caplog: pytest.LogCaptureFixture, base: str, named: str | None, warns: bool
) -> None:
    model = llama()
    model.config._name_or_path = model.name_or_path = base
    pool = [replace(adapter(name, "model.layers.0.self_attn.q_proj"), base_model=named) for name in "ab"]
    check_fit(model, base, pool)
    expected = "the base model is org/model, but adapters name another: 'a' (org/other), 'b' (org/other)"
    assert [record.getMessage() for record in caplog.records] == ([expected] if warns else [])
