"""Base models end to end: adapters on a loopback Hub and in folders, their cards and tags, what the catalog keeps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import update
from sync_world import Bench, outcomes
from test_sync_relabel import state_on_hub

from hub_router.lora.facts import inspect
from hub_router.records import AdapterFacts
from hub_router.store.base_choices import held, save_choice
from hub_router.store.tables import Adapter
from hub_router.sync.base_model import Statements, resolve
from hub_router.sync.run import SyncRequest, sync


def name_base(folder: Path, stated: object, card: str | None = None, **config: object) -> None:
    """Let an adapter's config and card name a base model."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": stated, **config}))
    (folder / "README.md").unlink(missing_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card)


def found(bench: Bench, repo_id: str = "ann/one") -> tuple[str | None, str]:
    row = bench.adapter(repo_id)
    return row.base_model_resolved, row.base_model_confidence


@pytest.mark.parametrize(
    ("stated", "card", "expected"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", None, ("meta-llama/Meta-Llama-3-8B", "medium")),
        (None, "---\nbase_model: a/b\n---\n", ("a/b", "medium")),
        ("/data/x", "---\nbase_model: ['a/b']\n---\n", ("a/b", "medium")),
        ("", "---\ntags: ['base_model:adapter:a/b']\n---\n", ("a/b", "medium")),
        ("a/b", "---\nbase_model: c/d\n---\n", ("a/b", "low")),
        ("gpt2", "---\nbase_model: gpt2\n---\n", ("openai-community/gpt2", "contradicted")),
        ("models/checkpoint-500", "---\nbase_model: ''\ntags: ['base_model:adapter:/x']\n---\n", (None, "none")),
    ],
)
def test_adapters_on_the_hub(bench: Bench, stated: object, card: str | None, expected: tuple[str | None, str]) -> None:
    name_base(bench.repo("ann/one"), stated, card)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert found(bench) == expected
    assert bench.adapter("ann/one").base_model_evidence


def test_tags_that_only_the_hub_holds_and_the_commit_of_a_cache_path(bench: Bench) -> None:
    name_base(bench.repo("ann/one"), None)
    state_on_hub(bench, "ann/one", tags=["base_model:a/b", "base_model:quantized:a/b", "lora"], cardData=None)
    bench.sync("ann/one")
    assert found(bench) == ("a/b", "medium")
    assert bench.adapter("ann/one").base_model_evidence == ["config names no base model", "tag base_model:a/b"]
    name_base(bench.repo("ann/two"), "/x/models--a--b/snapshots/" + "c" * 40)
    bench.hub.faults.clear()
    bench.sync("ann/two")
    assert bench.adapter("ann/two").base_model_revision == "c" * 40


def test_local_adapter_of_a_folder_is_held_to_the_model_in_it(bench: Bench, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    folder = bench.repo("mine/one")
    name_base(folder, str(base), auto_mapping={"base_model_class": "LlamaForCausalLM"})
    asked: list[tuple[str, tuple[str, ...]]] = []

    def fits(facts: AdapterFacts, model: str) -> str:
        asked.append((model, facts.targets))
        return ""

    sync(bench.store, SyncRequest(targets=(folder,)), inspect, options=bench.options, fits=fits)
    assert asked == [(str(base), ("q_proj", "v_proj"))]
    assert found(bench, str(folder)) == (str(base), "certain")
    assert "auto_mapping says LlamaForCausalLM" in bench.adapter(str(folder)).base_model_evidence


def test_misfit_of_an_adapter_on_the_hub_is_recorded(bench: Bench) -> None:
    name_base(bench.repo("ann/one"), "a/b")
    request = SyncRequest(targets=("ann/one",))
    sync(bench.store, request, inspect, options=bench.options, fits=lambda _, model: f"not as wide as {model}")
    assert found(bench) == ("a/b", "contradicted")
    assert bench.adapter("ann/one").base_model_evidence[-1] == "not a/b: not as wide as a/b"


def test_what_is_kept_resolves_to_what_was_found(bench: Bench) -> None:
    name_base(bench.repo("ann/one"), "/data/x", "---\nbase_model: a/b\n---\n")
    bench.sync("ann/one")
    row = bench.adapter("ann/one")
    with bench.store.read() as session:
        (entry,) = held(session, [row.id])
    again = resolve(Statements.of_stored(entry.stated, entry.statements))
    assert (again.id, again.confidence) == (row.base_model_resolved, row.base_model_confidence)
    assert list(again.evidence) == row.base_model_evidence


def test_choice_of_the_user_stays_through_syncs_and_renames(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    bench.sync("ann/one")
    with bench.store.write() as session:
        save_choice(session, "adapter", "ann/one", "my/base")
    name_base(folder, "a/b")
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert found(bench) == ("my/base", "certain")
    folder.rename(folder.parent / "new")
    bench.hub.renames["ann/one"] = "ann/new"
    bench.sync("ann/one")
    assert found(bench, "ann/new") == ("my/base", "certain")
    name_base(folder.parent / "new", "c/d")
    bench.sync("ann/new")
    assert found(bench, "ann/new") == ("my/base", "certain")


def test_row_of_an_earlier_release_is_resolved_by_the_next_sync(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    local = bench.repo("mine/one")
    bench.sync("ann/one", local)
    with bench.store.write() as session:
        before = {"base_model_resolved": None, "base_model_confidence": "none", "base_model_evidence": []}
        session.execute(update(Adapter).values(before))
    assert outcomes(bench.sync("ann/one", local)) == {"ann/one": "updated", str(local): "updated"}
    assert found(bench) == found(bench, str(local)) == ("owner/base", "high")
    assert outcomes(bench.sync("ann/one", local)) == {"ann/one": "unchanged", str(local): "unchanged"}
    assert folder.is_dir()


def test_listing_of_an_original_asks_nothing_about_adapters_of_its_copies(bench: Bench) -> None:
    copy, original = "unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"
    card = "---\nbase_model: {0}\n---\n".format
    name_base(bench.repo("ann/one"), copy, card(copy))
    name_base(bench.repo("ann/two"), original, card(original))
    bench.sync("ann/one", "ann/two")
    assert found(bench, "ann/one")[0] == found(bench, "ann/two")[0] == original
    listed = partial(bench.sync, base_model=original)
    summary = listed()
    assert outcomes(summary) == {"ann/two": "unchanged"}
    assert summary.requests == 1
    assert outcomes(bench.sync(base_model=copy)) == {"ann/one": "unchanged"}
