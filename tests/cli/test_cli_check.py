"""``check``: verdicts on adapters, and every module held against a base model of which only the config is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World

from hub_router.cli.checking import grouped
from hub_router.records import ModuleFit


@pytest.fixture
def config(world: World, tmp_path: Path) -> Path:
    """The base model's config alone."""
    (tmp_path / "config").mkdir()
    shutil.copy(world.base / "config.json", tmp_path / "config")
    return tmp_path / "config"


def test_adapters_that_fit(run_json: Callable[..., Any], world: World, config: Path) -> None:
    document = run_json("check", "colours", world.adapters["sums"], "--base", config)
    assert document["base_model"] == str(config)
    assert [(each["adapter"], each["verdict"]) for each in document["adapters"]] == [
        (str(world.adapters["colours"]), "usable"),
        (str(world.adapters["sums"]), "usable"),
    ]
    first = document["adapters"][0]["modules"]
    assert len(first) == 8
    assert first[0] == {
        "module": "model.layers.0.self_attn.q_proj",
        "verdict": "fits",
        "rank": 4,
        "got": "32 x 32",
        "expected": "32 x 32",
        "reason": "",
    }


def test_one_table_says_what_fits_what_is_absent_and_what_has_another_shape(
    run: Run, world: World, config: Path
) -> None:
    fields = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 2, "num_key_value_heads": 4}))
    done = run("check", "moods", "--base", config, status=1)
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {tuple(line[1:3]): line for line in lines if "{" in "".join(line)}
    assert rows.pop(("model.layers.{0-1}.self_attn.q_proj", "2"))[4:] == ["32", "x", "32", "32", "x", "32", "fits", "-"]
    shape = rows.pop(("model.layers.{0-1}.self_attn.v_proj", "2"))
    assert shape[4:11] == ["32", "x", "16", "32", "x", "32", "shape"]
    absent = rows.pop(("model.layers.{2-3}.self_attn.o_proj", "2"))
    assert "absent" in absent
    assert "model.layers.1.self_attn.o_proj," in absent
    assert len(rows) == 5
    assert "does not fit" in done.stdout


def test_unusable_ones_are_told_without_a_base(run: Run, world: World, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(world.adapters["colours"], pool / "good")
    shutil.copytree(world.adapters["colours"], pool / "deep" / "bad")
    (pool / "deep" / "bad" / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    done = run("check", pool, status=1)
    assert f"{pool}/deep/bad  unsupported  adapter_model.safetensors is a Git LFS pointer" in done.stdout
    assert f"{pool}/good      usable" in done.stdout
    assert "held against" not in done.stdout
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json in empty" in run("check", tmp_path / "empty", status=1).stdout


def test_what_cannot_be_found(run: Run, world: World, tmp_path: Path) -> None:
    assert "or name a folder" in run("check", "colour", "--base", world.base, status=1).stderr
    message = run("check", "colours", "--base", tmp_path / "nothing", status=1).stderr
    assert "cannot be loaded, expected a folder or Hub id" in message


def test_heads_and_other_parameters_are_in_the_table(
    run_json: Callable[..., Any], world: World, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headed"
    shutil.copytree(world.adapters["colours"], folder)
    stored = load_file(folder / "adapter_model.safetensors")
    stored["base_model.model.score.weight"] = torch.ones(2, 32)
    stored["base_model.model.model.norm.weight"] = torch.ones(32)
    stored["base_model.model.lm_head.weight"] = torch.ones(7, 32)
    save_file(stored, folder / "adapter_model.safetensors")
    document = run_json("check", folder, "--base", world.base, status=1)
    beside = {fit["module"]: (fit["verdict"], fit["got"]) for fit in document["adapters"][0]["modules"][8:]}
    assert beside == {
        "score.weight": ("no head", "(2, 32)"),
        "model.norm.weight": ("fits", "(32,)"),
        "lm_head.weight": ("shape", "(7, 32)"),
    }


def test_a_repository_of_several_adapters_is_all_of_them(home: Path, world: World) -> None:
    from hub_router import Hub
    from hub_router.store.repos import AdapterFields, RepoFields, save_adapter

    with Hub(home) as hub:
        facts = hub.show("colours").record
        with hub.store.write() as session:
            for name in ("one", "two"):
                fields = AdapterFields(name, str(facts.path), reason="broken on purpose")
                save_adapter(session, RepoFields("hub", "owner/many", "a" * 40), fields)
        checks = hub.check("owner/many", "colours")
    assert [(each.ref, each.verdict) for each in checks] == [
        ("owner/many/one", "unsupported"),
        ("owner/many/two", "unsupported"),
        (str(world.adapters["colours"]), "usable"),
    ]


def test_layers_of_a_kind_share_a_row() -> None:
    fits = [ModuleFit(f"h.{n}.q", "fits", 4, "2 x 2", "2 x 2") for n in (0, 1, 2, 5, 10)]
    fits += [ModuleFit("h.3.q", "absent", 4, "2 x 2"), ModuleFit("lm_head", "fits", 4, "2 x 2", "2 x 2")]
    fits += [ModuleFit(f"h.{n}.layer.1.q", "fits", 4, "2 x 2", "2 x 2") for n in (0, 1)]
    assert [row[:3] for row in grouped(fits)] == [
        ["h.{0-2,5,10}.q", 5, 4],
        ["h.3.q", 1, 4],
        ["lm_head", 1, 4],
        ["h.{0-1}.layer.1.q", 2, 4],
    ]
