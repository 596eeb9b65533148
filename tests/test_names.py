"""Names of modules, those of many layers as one."""

from __future__ import annotations

from hub_router.names import compact, kind_of, together


def test_layers_become_ranges_and_nothing_is_lost() -> None:
    names = [f"h.{n}.attn.q" for n in (10, 0, 1, 2, 5)] + ["lm_head", "h.3.mlp.up", "h.4.mlp.up", "h.3.experts.7.up"]
    assert compact(names) == ["h.{0-2,5,10}.attn.q", "lm_head", "h.{3-4}.mlp.up", "h.3.experts.7.up"]


def test_only_whole_components_are_numbers() -> None:
    assert kind_of("block2.layers.7.fc1") == "block2.layers.#.fc1"
    assert compact(["fc1", "fc2", "w1.x"]) == ["fc1", "fc2", "w1.x"]
    assert kind_of("0.weight") == "#.weight"


def test_repeated_and_single_names_stay() -> None:
    assert together(["h.3.q", "h.3.q"]) == "h.3.q"
    assert compact([]) == []
