"""Licence and tags that the Hub holds beside the README, and that change without a new commit."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select
from sync_world import CARD, Bench, outcomes

from hub_router.demo.hubfaults import Fault
from hub_router.store.tables import AdapterLabel
from hub_router.sync.card import Card, hub_card, with_hub


def state_on_hub(bench: Bench, repo_id: str, **stated: object) -> None:
    """Let the Hub state something else about a repository, at the same commit."""
    repo = bench.hub.shelf.get(repo_id)
    assert repo is not None
    body = {**repo.info(False), **stated}
    bench.hub.faults.clear()
    bench.hub.faults.add(Fault(rf"/api/models/{repo_id}\?", status=200, body=json.dumps(body).encode()))
    bench.hub.faults.add(Fault(r"/api/models\?", status=200, body=json.dumps([body]).encode()))


def tags(bench: Bench) -> set[str]:
    with bench.store.read() as session:
        return set(session.scalars(select(AdapterLabel.value).where(AdapterLabel.kind == "tag")))


def test_licence_and_tags_that_only_the_hub_holds(bench: Bench) -> None:
    bench.repo("ann/one", card=None)
    state_on_hub(bench, "ann/one", tags=["lora", "peft", "region:us", "license:mit"], cardData=None)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert bench.adapter("ann/one").licence == "mit"
    assert tags(bench) == {"lora"}


@pytest.mark.parametrize("asked", [{}, {"author": "ann"}], ids=["by name", "by listing"])
def test_change_without_a_new_commit_reaches_an_unchanged_adapter(bench: Bench, asked: dict[str, object]) -> None:
    bench.repo("ann/one", card="Only prose.")
    targets = () if asked else ("ann/one",)
    bench.sync("ann/one")
    before = bench.adapter("ann/one")
    state_on_hub(
        bench, "ann/one", tags=["new"], cardData={"license": "Apache-2.0", "tags": ["mine"]}, downloads=7, likes=3
    )
    assert outcomes(bench.sync(*targets, **asked)) == {"ann/one": "unchanged"}
    after = bench.adapter("ann/one")
    assert (before.licence, after.licence) == ("unknown", "apache-2.0")
    assert (after.id, after.downloads, after.likes) == (before.id, 7, 3)
    assert tags(bench) == {"new", "mine"}
    state_on_hub(bench, "ann/one", tags=["license:mit"], cardData={})
    bench.sync(*targets, **asked)
    assert bench.adapter("ann/one").licence == "mit"
    assert tags(bench) == set()


def test_readme_of_the_same_commit_comes_first(bench: Bench) -> None:
    bench.repo("ann/one", card=CARD)
    bench.sync("ann/one")
    state_on_hub(bench, "ann/one", tags=["extra", "license:gpl-3.0"], cardData={"license": "gpl-3.0"})
    bench.sync("ann/one")
    assert bench.adapter("ann/one").licence == "mit"
    assert tags(bench) == {"demo", "sst2", "extra"}


def test_what_the_hub_states_may_be_of_any_shape() -> None:
    assert hub_card(None, None) == Card()
    assert hub_card({"license": "other", "license_name": "Mine"}, ["license:other"]).licence == "mine"
    assert hub_card([], ["license:mit", 3, "x", "dataset:glue"]) == Card(licence="mit", tags=("x",))
    assert with_hub(Card("mit", ("a",)), Card("gpl", ("a", "b"))) == Card("mit", ("a", "b"))
