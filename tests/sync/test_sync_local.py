from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from sync_world import Bench, outcomes, reasons, write_adapter

from hub_router.lora.facts import inspect


def test_one_adapter_used_in_place(bench: Bench) -> None:
    folder = write_adapter(bench.folder / "mine")
    assert outcomes(bench.sync(folder)) == {str(folder): "added"}
    row = bench.adapter(str(folder))
    assert (row.path, row.status, row.licence, row.base_model_resolved) == (str(folder), "ready", "mit", "owner/base")
    assert len(row.revision) == 64
    assert row.weights_hash == inspect(folder).weights_hash
    assert bench.asked() == []
    assert not (bench.folder / "cache").exists()


def test_folder_of_adapters_gives_one_each(bench: Bench) -> None:
    top = bench.folder / "many"
    for name in ("x", "deep/y", "run/checkpoint-5", "run/checkpoint-30", "._x", "__MACOSX/z"):
        write_adapter(top / name)
    (top / "base").mkdir()
    (top / "base" / "model.safetensors").write_bytes(b"1")
    assert outcomes(bench.sync(str(top))) == {str(top / name): "added" for name in ("x", "deep/y", "run/checkpoint-30")}


def test_unchanged_changed_and_the_same_from_another_side(bench: Bench) -> None:
    top = bench.folder / "many"
    write_adapter(top / "x", seed=1)
    write_adapter(top / "y", seed=2)
    (top / "README.md").write_text("---\nlicense: mit\n---\nBoth.")
    bench.sync(top)
    assert set(outcomes(bench.sync(top)).values()) == {"unchanged"}
    assert outcomes(bench.sync(top / "x")) == {str(top / "x"): "unchanged"}
    write_adapter(top / "x", seed=3)
    assert outcomes(bench.sync(top)) == {str(top / "x"): "updated", str(top / "y"): "unchanged"}
    assert len(bench.rows()) == 2


def test_vanished_adapters_are_missing(bench: Bench) -> None:
    top = bench.folder / "many"
    write_adapter(top / "x")
    write_adapter(top / "y")
    write_adapter(bench.folder / "many-others")
    bench.sync(top, bench.folder / "many-others")
    shutil.rmtree(top / "y")
    assert outcomes(bench.sync(top)) == {str(top / "x"): "unchanged", str(top / "y"): "missing"}
    assert bench.rows()[str(top / "y")] == ("missing", "no adapter in this folder any more")
    shutil.rmtree(top)
    summary = bench.sync(top)
    assert outcomes(summary) == {str(top): "missing", str(top / "x"): "missing"}
    assert f"no folder {top}" in reasons(summary)
    assert bench.rows()[str(bench.folder / "many-others")][0] == "ready"
    write_adapter(top / "x")
    assert outcomes(bench.sync(top)) == {str(top / "x"): "updated"}
    assert bench.rows()[str(top / "x")] == ("ready", "")


def test_folder_without_adapter_and_no_folder(bench: Bench) -> None:
    (bench.folder / "empty").mkdir()
    summary = bench.sync(bench.folder / "empty", bench.folder / "none")
    assert outcomes(summary) == {
        str(bench.folder / "empty"): "unsupported",
        str(bench.folder / "none"): "missing",
    }


def test_broken_one_is_unsupported_and_the_rest_is_added(bench: Bench) -> None:
    top = bench.folder / "many"
    write_adapter(top / "good")
    (write_adapter(top / "bad") / "adapter_config.json").write_text("[]")
    (write_adapter(top / "bare") / "adapter_model.safetensors").unlink()
    summary = bench.sync(top)
    assert outcomes(summary) == {
        str(top / "good"): "added",
        str(top / "bad"): "unsupported",
        str(top / "bare"): "unsupported",
    }
    assert outcomes(bench.sync(top)) == outcomes(summary) | {str(top / "good"): "unchanged"}
    write_adapter(top / "bare")
    assert outcomes(bench.sync(top))[str(top / "bare")] == "updated"


def test_links_that_leave_the_folder_are_not_followed(bench: Bench) -> None:
    secret = write_adapter(bench.folder / "secret")
    top = bench.folder / "many"
    linked = write_adapter(top / "linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    (top / "folder").symlink_to(secret)
    inside = write_adapter(top / "inside")
    (inside / "adapter_model.safetensors").rename(top / "weights")
    (inside / "adapter_model.safetensors").symlink_to("../weights")
    (inside / "dangling").symlink_to("nowhere")
    summary = bench.sync(top)
    assert outcomes(summary) == {str(linked): "unsupported", str(inside): "added"}
    assert f"adapter_model.safetensors is a link that leaves {top}" in reasons(summary)


def test_snapshot_of_the_hub_cache_is_a_local_folder_like_any_other(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync("ann/one")
    snapshot = Path(bench.adapter("ann/one").path)
    assert (snapshot / "adapter_model.safetensors").is_symlink()
    assert outcomes(bench.sync(snapshot)) == {str(snapshot): "added"}


def test_both_sources_in_one_run(bench: Bench) -> None:
    bench.repo("ann/one")
    folder = write_adapter(bench.folder / "mine")
    assert outcomes(bench.sync("ann/one", folder)) == {"ann/one": "added", str(folder): "added"}
    assert {line.source for line in bench.sync("ann/one", folder).outcomes} == {"hub", "local"}


def test_samples_and_notes_of_a_local_adapter(bench: Bench) -> None:
    folder = write_adapter(bench.folder / "mine", card="---\nlicense: [\n---\n")
    (folder / "test.jsonl").write_text("nothing\n" + json.dumps({"input": "a", "output": "b"}))
    bench.sync(folder)
    notes = bench.adapter(str(folder)).notes
    assert any(note.startswith("card metadata ignored") for note in notes)
    assert any(note.startswith("1 lines of test.jsonl left out") for note in notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folder_is_a_failure_not_a_loss(bench: Bench) -> None:
    top = bench.folder / "many"
    write_adapter(top / "x" / "y")
    bench.sync(top)
    (top / "x").chmod(0)
    try:
        assert outcomes(bench.sync(top)) == {str(top): "failed"}
    finally:
        (top / "x").chmod(0o755)
    assert bench.rows()[str(top / "x" / "y")][0] == "ready"


def test_config_that_does_not_parse_is_named_before_missing_weights(bench: Bench) -> None:
    folder = bench.folder / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{broken")
    text = reasons(bench.sync(folder))
    assert text.startswith("adapter_config.json is not JSON: ")
    assert "no adapter_model.safetensors" in text
