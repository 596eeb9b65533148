"""``list`` and ``show`` over a real catalog."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import TASKS, Run, World
from safetensors.torch import load_file

KEYS = {
    *("ref", "name", "id", "source", "repo_id", "revision", "subfolder", "path", "status", "reason", "base_model"),
    *("base_model_resolved", "licence", "peft_type", "ranks", "targets", "dtypes", "modules", "parameters"),
    *("size_bytes", "weights_hash", "tags", "datasets", "downloads", "likes", "extra"),
    *("base_model_confidence", "base_model_evidence", "base_model_revision"),
}


def names(document: dict[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in document["adapters"]]


def test_list_json_has_stable_keys_and_true_values(run_json: Callable[..., Any], world: World) -> None:
    document = run_json("list")
    assert list(document) == ["adapters", "repositories"]
    assert document["repositories"] == []
    by_name = {adapter["name"]: adapter for adapter in document["adapters"]}
    assert set(by_name) == set(TASKS)
    for task, (rank, targets, licence, _, _) in TASKS.items():
        adapter = by_name[task]
        assert set(adapter) == KEYS
        assert adapter["ref"] == str(world.adapters[task])
        assert adapter["ranks"] == [rank]
        assert adapter["targets"] == sorted(targets)
        assert adapter["licence"] == (licence or "unknown")
        weights = load_file(world.adapters[task] / "adapter_model.safetensors")
        assert adapter["parameters"] == sum(tensor.numel() for tensor in weights.values())
        assert adapter["modules"] == len(weights) // 2 == 4 * len(targets)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--licence", "mit"], {"colours", "moods"}),
        (["--licence", "unknown"], {"sums"}),
        (["--rank", 4], {"colours", "moods"}),
        (["--rank", 4, "--target", "o_proj"], {"moods"}),
        (["--target", "v_proj"], {"colours", "capitals", "moods"}),
        (["--tag", "capitals"], {"capitals"}),
        (["--tag", "demo", "--rank", 2], {"sums"}),
        (["--base-model", "other/model"], set()),
        (["--status", "unsupported"], set()),
    ],
)
def test_list_filters(run_json: Callable[..., Any], options: list[object], expected: set[str]) -> None:
    assert set(names(run_json("list", *options))) == expected


def test_list_limit_and_table(run: Run, run_json: Callable[..., Any]) -> None:
    assert names(run_json("list", "--limit", 2)) == ["capitals", "colours"]
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["adapter", "base", "model", "ranks", "targets", "licence", "size"]
    assert len(lines) == 1 + len(TASKS)
    assert lines[1].startswith("/")


def test_list_of_an_empty_catalog_says_how_to_fill_it(run: Run, tmp_path: Path) -> None:
    done = run("list", "--database-url", f"sqlite:///{tmp_path / 'empty.db'}")
    assert done.stdout == ""
    assert "hub-router sync" in done.stderr


def test_show_json(run_json: Callable[..., Any], world: World) -> None:
    document = run_json("show", "capitals")
    assert set(document) == {"adapter", "card", "files", "samples", "spectra", "embeddings"}
    assert document["adapter"]["name"] == "capitals"
    assert "capital of France" in document["card"]
    files = {file["path"]: file["size_bytes"] for file in document["files"]}
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[file] == (world.adapters["capitals"] / file).stat().st_size
    samples = [sample for sample in document["samples"] if sample["split"] == "sample"]
    # The file holds the same line SAMPLES times.
    assert [(sample["input"], sample["output"]) for sample in samples] == [TASKS["capitals"][3:]]


def test_show_spectra_are_the_singular_values_of_the_update(run_json: Callable[..., Any], world: World) -> None:
    spectra = run_json("show", "sums")["spectra"]
    weights = load_file(world.adapters["sums"] / "adapter_model.safetensors")
    prefix = "base_model.model."
    modules = {key.removeprefix(prefix).removesuffix(".lora_A.weight") for key in weights if "lora_A" in key}
    assert set(spectra) == modules
    for module in modules:
        update = weights[f"{prefix}{module}.lora_B.weight"] @ weights[f"{prefix}{module}.lora_A.weight"]
        expected = (2 * update.double()).svd().S[:2].tolist()  # alpha / r = 2, rank 2
        assert spectra[module]["singular_values"] == pytest.approx(expected, rel=1e-4)
        assert not spectra[module]["zero"]


def test_show_text_has_every_section(run: Run) -> None:
    shown = run("show", "moods").stdout
    for expected in ("mit", "k_proj, o_proj, q_proj, v_proj", "Files", "Card", "-> yes", "offline", "█"):
        assert expected in shown, expected
    assert "model.layers.{0-3}.self_attn.q_proj" in shown


def test_show_takes_a_folder_an_id_and_a_short_name(run_json: Callable[..., Any], world: World) -> None:
    first = run_json("show", "colours")["adapter"]
    assert run_json("show", first["id"])["adapter"] == first
    assert run_json("show", world.adapters["colours"])["adapter"] == first


def test_show_of_an_unknown_adapter_names_the_nearest(run: Run) -> None:
    done = run("show", "colour", "--json", status=1)
    assert done.stdout == ""
    assert "colours" in done.stderr


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["--licence", "gpl-3.0"], ["licences: mit (2), apache-2.0 (1), unknown (1)"]),
        (["--rank", 999], ["ranks: 4 (2), 2 (1), 8 (1)"]),
        (
            ["--rank", 2, "--licence", "mit"],
            ["licences: mit (2), apache-2.0 (1), unknown (1)", "ranks: 4 (2), 2 (1), 8 (1)"],
        ),
        (["--status", "gated"], []),
        (["--status", "gated", "--tag", "demo"], ["tags: none"]),
    ],
)
def test_filters_that_nothing_fits_are_told_what_there_is(run: Run, options: list[object], lines: list[str]) -> None:
    done = run("list", *options)
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.endswith("adapters that it holds: 4 ready")
    assert sorted(rest) == lines


def test_show_of_what_is_gone_says_so_once_and_advises_no_index(run: Run, home: Path) -> None:
    with sqlite3.connect(home / "catalog.db") as database:
        database.execute("UPDATE adapters SET status = 'gated', reason = 'gated: accept its licence'")
        database.execute("DELETE FROM adapter_spectra")
        database.execute("DELETE FROM text_embeddings")
    shown = run("show", "moods").stdout
    assert "status        gated: accept its licence\n" in shown
    assert "hub-router index" not in shown
    assert "Spectra: none\n" in shown
    listed = run("list", "--status", "gated").stdout.splitlines()
    assert all(line.endswith("  gated   accept its licence") for line in listed[1:])
