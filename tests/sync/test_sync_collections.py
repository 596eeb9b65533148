"""Every bundled manifest: it parses, names what its sources name, and syncs from a Hub that serves those ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select
from sync_world import Bench, outcomes, write_adapter

from hub_router.records import Sample
from hub_router.settings import bundled
from hub_router.store.tables import Adapter, Repo
from hub_router.sync.client import HubClient
from hub_router.sync.manifest import Manifest, load_manifest, manifest_faults
from hub_router.sync.plan import Plan, SyncRequest, make_plan

BUNDLED = sorted(path.stem for path in bundled("catalog").glob("*.toml"))
# Entries, and those whose ids are less sure than the manifest's own confidence.
COUNTS = {
    "arrow-phi3": (10, {}),
    "fusion-bench-base": (8, {}),
    "fusion-bench-large": (8, {}),
    "granite": (15, {}),
    "knots": (6, {}),
    "lora-land": (27, {}),
    "lorahub": (196, {}),
    "loraretriever-13b": (66, {"B": 59}),
    "loraretriever-7b": (66, {"B": 18}),
    "lots-of-loras": (0, {}),
    "meteora-llama2-13b": (28, {}),
    "meteora-llama3-8b": (28, {}),
    "zoo": (21, {}),
}
# Pages of the Hub with these ids were seen; one of them keeps the zero in front of its number.
LOTS = [f"Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task{number}" for number in ("1400", "1609", "081")]
SOURCE = Path(__file__).resolve().parents[3] / "shared" / "collections.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says nothing of itself: no card, no samples, no base model."""
    folder = write_adapter(tmp_path_factory.mktemp("plain"), card=None)
    (folder / "samples.jsonl").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    return folder


def own_manifest(bench: Bench, text: str) -> Path:
    path = bench.folder / "own.toml"
    head = 'name = "own"\ntitle = "t"\ndescription = "d"\nlicence = "mit"\nconfidence = "A"\nbase_model = "a/base"\n'
    path.write_text(head + text)
    return path


def texts_and_bases(bench: Bench) -> dict[str, tuple[str, str | None]]:
    """Card text and base model of every adapter in the catalog."""
    query = select(Repo.repo_id, Adapter.subfolder, Adapter.card_text, Adapter.base_model_resolved).join(Adapter)
    with bench.store.read() as session:
        return {f"{repo}/{folder}".rstrip("/"): (text, base) for repo, folder, text, base in session.execute(query)}


def plan_of(bench: Bench, *targets: str, **asked: object) -> Plan:
    request = SyncRequest(targets=targets, **asked)  # type: ignore[arg-type]
    return make_plan(bench.store, HubClient(bench.options), request)


def test_every_bundled_manifest_has_its_counts_here() -> None:
    assert sorted(COUNTS) == BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_manifest_says_what_a_user_must_know(name: str) -> None:
    assert manifest_faults(name) == ()
    manifest = load_manifest(name)
    entries, uncertain = COUNTS[name]
    assert manifest.name == name
    assert len(manifest.repos) == entries
    assert {letter: len(names) for letter, names in manifest.uncertain.items()} == uncertain
    assert set(manifest.tasks) == set(manifest.members)
    assert manifest.sample_source
    assert all(target.revision is None for target in manifest.repos)
    assert manifest.base_model or "base_model" in manifest.description


def source_ids(data: dict[str, dict[str, object]]) -> dict[str, object]:
    """What the source names, in the form in which the manifests name it."""

    def folders(key: str) -> list[str]:
        repo = str(data[key]["repo"]).split(" ")[0]
        return [f"{repo}/{folder}" for folder in data[key]["subfolders"]]  # type: ignore[attr-defined]

    fusion = data["fusion_bench"]["ids"]
    return {
        "arrow-phi3": folders("arrow_phi3"),
        "fusion-bench-base": [name for name in fusion if "flan-t5-base_" in name],  # type: ignore[attr-defined]
        "fusion-bench-large": [name for name in fusion if "flan-t5-large_" in name],  # type: ignore[attr-defined]
        "lora-land": data["lora_land"]["ids"],
        "lorahub": data["lorahub"]["ids"],
        "loraretriever-13b": data["loraretriever_13b"]["ids"],
        "loraretriever-7b": data["loraretriever_7b"]["ids"],
        "meteora-llama2-13b": folders("meteora_llama2_13b"),
        "meteora-llama3-8b": folders("meteora_llama3_8b"),
    }


@pytest.mark.skipif(not SOURCE.is_file(), reason="the list that the manifests were made from is not here")
def test_ids_are_those_of_the_source() -> None:
    data = json.loads(SOURCE.read_text())
    for name, ids in source_ids(data).items():
        assert list(load_manifest(name).members) == ids, name
    seven = load_manifest("loraretriever-7b")
    sure = [name for name, letter in seven.confidences().items() if letter == "A"]
    assert sure == data["loraretriever_7b"]["core48"]
    assert {target.repo_id for target in load_manifest("granite").repos} == set(data["granite"]["repos"])
    lots = load_manifest("lots-of-loras")
    assert lots.pattern + "{n}" == data["lots_of_loras"]["pattern"]
    assert (lots.base_model, lots.licence) == (data["lots_of_loras"]["base"], data["lots_of_loras"]["license"])
    for pin in (f"{name.split('/')[1]} {sha}" for name, sha in data["lora_land"]["pinned"].items()):
        assert pin in load_manifest("lora-land").description


def served(manifest: Manifest, limit: int | None) -> dict[str, str]:
    """Adapter -> task: one for each entry, in the libraries two folders below it."""
    below = "" if manifest.base_model else "/granite-4.1-3b/lora"
    tasks = {f"{name}{below}": manifest.tasks[name] for name in manifest.members[:limit]}
    return tasks if manifest.repos else dict.fromkeys(LOTS, "")


@pytest.mark.parametrize("name", BUNDLED)
def test_manifest_syncs(name: str, bench: Bench, plain: Path) -> None:
    manifest = load_manifest(name)
    limit = 12 if len(manifest.repos) > 100 else None
    tasks = served(manifest, limit)
    for adapter in tasks:
        shutil.copytree(plain, bench.folder / "hub" / adapter)
    if manifest.pattern:
        shutil.copytree(plain, bench.folder / "hub" / manifest.author / "another")
    summary = bench.sync(collection=name, limit=limit)
    assert outcomes(summary) == dict.fromkeys(tasks, "added")
    stored = {adapter: (f"Task: {task}" if task else "", manifest.base_model) for adapter, task in tasks.items()}
    assert texts_and_bases(bench) == stored
    bench.asked()
    assert set(outcomes(bench.sync(collection=name, limit=limit)).values()) == {"unchanged"}
    assert not [request for request in bench.asked() if "resolve" in request]


def test_tasks_and_samples_of_folders_reach_the_adapters_below_them(bench: Bench) -> None:
    text = (
        'repos = ["a/lib/x", "a/lib/x/deep", "a/lib", "a/one"]\n'
        '[tasks]\n"a/lib" = "all"\n"a/lib/x" = "near"\n"a/one" = "one"\n'
        '[[samples]]\nrepo = "a/lib/x"\ninput = "in"\noutput = "out"\n'
    )
    plan = plan_of(bench, collection=own_manifest(bench, text))
    library, one = plan.repos["a/lib"], plan.repos["a/one"]
    assert library.subfolders == ("", "x", "x/deep")
    folders = ("", "x", "x/deep/er", "xy", "y/x")
    assert [library.task_of(folder) for folder in folders] == ["all", "near", "near", "all", "all"]
    sample = (Sample("in", "out", "sample", "manifest own"),)
    assert [library.samples_of(folder) for folder in folders] == [(), sample, sample, (), ()]
    assert (one.task_of(""), one.samples_of(""), one.base_model) == ("one", (), "a/base")


def test_a_repository_named_beside_its_collection_keeps_what_the_manifest_states(bench: Bench) -> None:
    for name in ("a/zoo-x", "a/zoo-y"):
        bench.repo(name, card=None)
    stated = '[tasks]\n"a/zoo-x" = "mood"\n[[samples]]\nrepo = "a/zoo-x"\ninput = "in"\n'
    for text in ('repos = ["a/zoo-x"]\n' + stated, 'author = "a"\nprefix = "Zoo-"\n' + stated):
        plan = plan_of(bench, "a/zoo-x", collection=own_manifest(bench, text), author="a")
        assert list(plan.repos) == ["a/zoo-x", "a/zoo-y"]
        wanted = plan.repos["a/zoo-x"]
        assert (wanted.task_of(""), len(wanted.samples_of("")), wanted.base_model) == ("mood", 1, "a/base")
        assert wanted.info is not None


def test_limit_counts_the_entries_of_a_manifest(bench: Bench) -> None:
    text = 'repos = ["a/lib/x", "a/lib/y", "a/lib/z", "a/one"]\n'
    plan = plan_of(bench, collection=own_manifest(bench, text), limit=2)
    assert {name: wanted.subfolders for name, wanted in plan.repos.items()} == {"a/lib": ("x", "y")}
