"""The Python face on the bundled zoo: sync, index, search, compose, load, evaluate, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub_router import Hub, RoutedModel, compose
from hub_router.errors import (
    HubRouterError,
    IncompatibleAdaptersError,
    MethodError,
    NameTakenError,
    NotInCatalogError,
)
from hub_router.settings import bundled

MEMBERS = ("zoo-film", "zoo-food", "zoo-plural", "zoo-category")
PROMPT = "Movie review: The script was not silly. Does the critic like the film?"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters of the zoo and its base model, in a folder that tests may change."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in (*MEMBERS, "zoo-base"):
        shutil.copytree(bundled("zoo") / "hub_router" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def hub(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("home")) as hub:
        summary = hub.sync(*(zoo / name for name in MEMBERS))
        assert summary.counts["added"] == len(MEMBERS)
        indexed = hub.index("offline")
        assert (indexed.spectra, indexed.embedded, indexed.failed) == (len(MEMBERS), len(MEMBERS), ())
        yield hub


def test_a_second_sync_and_index_do_nothing(hub: Hub, zoo: Path) -> None:
    assert hub.sync(*(zoo / name for name in MEMBERS)).counts["unchanged"] == len(MEMBERS)
    again = hub.index()
    assert (again.spectra, again.embedded, again.encoder) == (0, 0, "offline")


def test_search_finds_the_adapter_of_the_task(hub: Hub) -> None:
    hits = hub.search("make this noun plural", limit=2)
    assert hits[0].adapter.name == "zoo-plural"
    assert hits[0].score > hits[1].score
    assert hits[0].text
    assert [hit.adapter.name for hit in hub.search("is this review positive?", licence="mit")] == [
        "zoo-food",
        "zoo-plural",
    ]
    with pytest.raises(HubRouterError, match="empty"):
        hub.search("  ")


def test_a_stored_composition_loads_and_answers(hub: Hub, zoo: Path) -> None:
    hits = hub.search("is this review positive?", limit=2)
    base = str(zoo / "zoo-base")
    routed = hub.compose("reviews", [hit.adapter for hit in hits], method="arrow", base_model=base, top_k=1)
    assert routed.adapters == tuple(hit.adapter.name for hit in hits)
    text = routed.generate(PROMPT, max_new_tokens=4)
    assert hub.load("reviews").generate(PROMPT, max_new_tokens=4) == text
    stored = {entry.name: entry for entry in hub.compositions()}["reviews"]
    assert (stored.method, dict(stored.hyperparameters), stored.base_model) == ("arrow", {"top_k": 1}, base)
    with pytest.raises(NameTakenError, match="reviews"):
        hub.define("reviews", ["zoo-food"], base_model=base)
    hub.define("reviews", {"mine": "zoo-food"}, "uniform", base_model=base, replace=True)
    assert hub.load("reviews").adapters == ("mine",)
    hub.delete_composition("reviews")
    with pytest.raises(NotInCatalogError, match="reviews"):
        hub.load("reviews")


def test_spectra_of_the_catalog_give_the_logits_of_computed_ones(hub: Hub, zoo: Path) -> None:
    routed = hub.compose("spectra", MEMBERS, method="arrow", base_model=str(zoo / "zoo-base"), top_k=2)
    ids = routed.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        catalogued = routed(input_ids=ids).logits
    tokenizer, model = routed.tokenizer, routed.detach()
    plain = compose(model, {name: zoo / name for name in MEMBERS}, method="arrow", tokenizer=tokenizer, top_k=2)
    with torch.inference_mode():
        torch.testing.assert_close(plain(input_ids=ids).logits, catalogued, rtol=1e-5, atol=1e-5)
    plain.detach()


def test_evaluation_scores_own_adapter_above_base(hub: Hub, zoo: Path) -> None:
    hub.define("scored", MEMBERS, "arrow", base_model=str(zoo / "zoo-base"))
    table = hub.evaluate("scored", ["base", "own", "arrow"], samples=16)
    assert table.methods == ("base", "own", "arrow")
    assert [(row.task, row.samples) for row in table.rows] == [(name, 16) for name in MEMBERS]
    assert table.mean["own"] > 0.9 > table.mean["base"]
    for row in table.rows:
        routed = hub.load("scored")
        single = compose(routed.detach(), [zoo / row.task], "single", tokenizer=routed.tokenizer, adapter=row.task)
        lines = [json.loads(line) for line in (zoo / row.task / "test.jsonl").read_text().splitlines()[:16]]
        right = sum(single.generate(line["input"], max_new_tokens=12).strip() == line["output"] for line in lines)
        assert row.accuracy["own"] == right / 16


def test_a_task_is_also_scored_without_its_adapter(hub: Hub, zoo: Path) -> None:
    hub.define("unseen", MEMBERS, "arrow", base_model=str(zoo / "zoo-base"), top_k=1)
    table = hub.evaluate("unseen", ["own", "arrow"], tasks=["zoo-plural"], samples=32, unseen=True)
    [row] = table.rows
    rest = hub.compose(
        "rest", [name for name in MEMBERS if name != "zoo-plural"], "arrow", base_model=str(zoo / "zoo-base"), top_k=1
    )
    lines = [json.loads(line) for line in (zoo / "zoo-plural" / "test.jsonl").read_text().splitlines()[:32]]
    answers = rest.generate([line["input"] for line in lines], max_new_tokens=12)
    right = sum(got.strip() == line["output"] for got, line in zip(answers, lines, strict=True))
    assert row.unseen == {"arrow": right / 32}
    assert row.accuracy["own"] > row.unseen["arrow"] + 0.2
    with pytest.raises(NotInCatalogError, match="zoo-plurals"):
        hub.evaluate("unseen", tasks=["zoo-plurals"])


def test_a_pool_report_takes_a_composition_or_adapters(hub: Hub, zoo: Path) -> None:
    hub.define("reported", MEMBERS, "uniform", base_model=str(zoo / "zoo-base"))
    report = hub.report_pool("reported", top_k=1)
    assert report.adapters == MEMBERS
    assert report.calibration.chosen.balanced > report.calibration.published.balanced
    assert {task.adapter: task.nearest for task in report.tasks}["zoo-film"] == "zoo-food"
    again = hub.report_pool([hub.show(name).record for name in MEMBERS], epsilon=report.epsilon, top_k=1)
    assert (again.tasks, again.calibration) == (report.tasks, report.calibration)


def test_save_and_load_from_a_folder(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    routed = hub.compose("saved", MEMBERS, "spectr", base_model=str(zoo / "zoo-base"), replace=True)
    text = routed.generate(PROMPT, max_new_tokens=4)
    routed.save(tmp_path / "saved")
    assert RoutedModel.load(tmp_path / "saved").generate(PROMPT, max_new_tokens=4) == text


def test_define_refuses_before_anything_is_stored(hub: Hub, zoo: Path) -> None:
    base = str(zoo / "zoo-base")
    cases = [
        ({"adapters": []}, MethodError, "at least one"),
        ({"adapters": ["zoo-flim"]}, NotInCatalogError, "zoo-film"),
        ({"adapters": ["zoo-film", "zoo-film"]}, MethodError, "twice"),
        ({"adapters": ["zoo-film"], "method": "arow"}, MethodError, "arrow"),
        ({"adapters": ["zoo-film"], "topk": 2}, MethodError, "top_k"),
        ({"adapters": ["zoo-film"], "top_k": 0}, MethodError, "top_k"),
        ({"adapters": ["zoo-film"], "method": "single", "adapter": "zoo-food"}, MethodError, "zoo-food"),
        ({"adapters": MEMBERS, "method": "merged"}, MethodError, "rank"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            hub.define("refused", **{"base_model": base, **arguments})
    assert "refused" not in [entry.name for entry in hub.compositions()]


def test_every_mismatch_with_another_base_is_listed(hub: Hub, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    widths = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=32, **widths, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleAdaptersError) as caught:
        hub.define("misfit", ["zoo-film", "zoo-plural"], base_model=str(tmp_path))
    modules = sum(len(hub.show(name).spectra) for name in ("zoo-film", "zoo-plural"))
    assert len(caught.value.mismatches) == modules


def test_files_that_changed_after_composing_are_refused(zoo: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(zoo / "zoo-film", tmp_path / "zoo-film"))
    with Hub(tmp_path / "home") as hub:
        hub.sync(copy)
        hub.define("film", ["zoo-film"], base_model=str(zoo / "zoo-base"))
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
        with pytest.raises(NotInCatalogError, match="changed since"):
            hub.load("film")
        assert hub.sync(copy).counts["updated"] == 1
        with pytest.raises(NotInCatalogError, match="film"):
            hub.load("film")
        hub.define("film", ["zoo-film"], base_model=str(zoo / "zoo-base"), replace=True)
        hub.load("film").detach()
