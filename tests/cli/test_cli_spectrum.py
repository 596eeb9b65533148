"""The bar chart of ``show``."""

from __future__ import annotations

import numpy as np
import pytest

from hub_router.cli.spectrum import bars, chart, summarise
from hub_router.records import Spectrum


def spectrum(module: str, *values: float, ambiguous: bool = False) -> Spectrum:
    direction = None if not any(values) else np.ones(2, dtype=np.float32)
    return Spectrum(module, np.array(values, dtype=np.float32), direction, ambiguous)


def by_module(*spectra: Spectrum) -> dict[str, Spectrum]:
    return {entry.module: entry for entry in spectra}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((8.0, 4.0, 1.0), "█▅▂"),
        ((1.0,), "█"),
        ((0.0, 0.0), "▁▁"),
        ((), ""),
        ((1.0, 0.0), "█▁"),
    ],
)
def test_bars_are_relative_to_the_largest(values: tuple[float, ...], expected: str) -> None:
    assert bars(values) == expected


def test_layers_of_one_kind_share_a_line_with_their_mean() -> None:
    kinds = summarise(
        by_module(
            *(spectrum(f"model.layers.{i}.self_attn.q_proj", 4.0 + i, 2.0) for i in (0, 1, 2, 5)),
            spectrum("model.layers.0.mlp.up_proj", 1.0, 1.0, ambiguous=True),
            spectrum("model.layers.1.mlp.up_proj", 0.0, 0.0),
            spectrum("lm_head", 3.0),
        )
    )
    assert [kind.modules for kind in kinds] == [
        "model.layers.{0-2,5}.self_attn.q_proj",
        "model.layers.{0-1}.mlp.up_proj",
        "lm_head",
    ]
    assert [kind.count for kind in kinds] == [4, 2, 1]
    assert kinds[0].singular_values == (6.0, 2.0)  # (4 + 5 + 6 + 9) / 4
    lines = chart(kinds)
    assert lines[0] == "  model.layers.{0-2,5}.self_attn.q_proj  █▃  6 to 2"
    assert "1 without direction, 1 with two equal largest values" in lines[1]


def test_layers_of_another_rank_get_their_own_line() -> None:
    kinds = summarise(by_module(spectrum("h.0.c_attn", 2.0, 1.0), spectrum("h.1.c_attn", 2.0)))
    assert [(kind.modules, len(kind.singular_values)) for kind in kinds] == [("h.0.c_attn", 2), ("h.1.c_attn", 1)]


def test_two_numbers_in_a_path() -> None:
    modules = [f"layers.{i}.experts.{j}.w1" for i in range(2) for j in range(3)]
    [kind] = summarise(by_module(*(spectrum(module, 1.0) for module in modules)))
    assert (kind.modules, kind.count) == ("layers.{0-1}.experts.{0-2}.w1", 6)
