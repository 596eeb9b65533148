"""``prototypes``: sets of a real catalog listed, shown, compared, and carried to another catalog."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import Run, World, invoke, save_adapter

from hub_router import Hub
from hub_router.errors import ArtifactError, HubRouterError, NotInCatalogError, StaleFeaturesError
from hub_router.prototypes import PrototypeMember, Prototypes, read_prototypes, write_prototypes
from hub_router.records import AdapterRecord

POOL = ("colours", "capitals", "moods")
Json = Callable[..., Any]


def trained(hub: Hub, tasks: tuple[str, ...] = POOL, seed: int = 0, **given: Any) -> tuple[Prototypes, dict[str, Any]]:
    """Random vectors in place of training's, for the modules that each adapter has."""
    generator = np.random.default_rng(seed)
    records = {task: hub.show(task).record for task in tasks}
    members = []
    for task, record in records.items():
        spectra = hub.show(record.ref).spectra
        vectors = {module: generator.standard_normal(32).astype(np.float32) for module in spectra}
        members.append(PrototypeMember(task, record.weights_hash, vectors))
    base = str(hub.show(tasks[0]).record.base_model_resolved)
    return Prototypes("maple", base, tuple(members), **given), records


def nearby(prototypes: Prototypes, **changes: Any) -> Prototypes:
    """A set a small step away."""
    generator = np.random.default_rng(5)
    moved = [
        {m: v + 0.1 * generator.standard_normal(v.shape).astype(np.float32) for m, v in member.vectors.items()}
        for member in prototypes.members
    ]
    members = [replace(member, vectors=vectors) for member, vectors in zip(prototypes.members, moved, strict=True)]
    return replace(prototypes, members=tuple(members), **changes)


@pytest.fixture
def gates(home: Path) -> Prototypes:
    """``gates@1`` refined from Arrow, ``gates@2`` from that."""
    with Hub(home) as hub:
        made = {"hyperparameters": {"lr": 0.001, "mask": True}, "metrics": {"loss": 0.5}, "data_hash": "d" * 64}
        prototypes, records = trained(hub, parent="arrow", seed=0, **made)
        prototypes = replace(prototypes, seed=7)
        assert hub.prototypes.save("gates", prototypes, records) == 1
        assert hub.prototypes.save("gates", nearby(prototypes, parent="gates@1"), records) == 2
    return prototypes


def test_an_empty_catalog_names_what_makes_a_set(run: Run, run_json: Json) -> None:
    assert run_json("prototypes", "list") == {"sets": []}
    assert "hub-router train" in run("prototypes", "list").stderr


def test_list_has_every_version(run: Run, run_json: Json, gates: Prototypes) -> None:
    first, second = run_json("prototypes", "list")["sets"]
    vectors = sum(len(member.vectors) for member in gates.members)
    assert first == {
        "set": "gates@1",
        "name": "gates",
        "version": 1,
        "method": "maple",
        "parent": "arrow",
        "base_model": gates.base_model,
        "hyperparameters": {"lr": 0.001, "mask": True},
        "metrics": {"loss": 0.5},
        "data_hash": "d" * 64,
        "seed": 7,
        "adapters": 3,
        "vectors": vectors,
        "stale": [],
    }
    assert second == {**first, "set": "gates@2", "version": 2, "parent": "gates@1"}
    lines = run("prototypes", "list").stdout.splitlines()
    assert lines[1].split() == ["gates@1", "maple", "arrow", gates.base_model, "3", str(vectors), "0"]


def test_show_takes_a_version_and_names_the_adapters(run: Run, run_json: Json, world: World, gates: Prototypes) -> None:
    newest = run_json("prototypes", "show", "gates")
    assert (newest["set"], run_json("prototypes", "show", "gates@1")["set"]) == ("gates@2", "gates@1")
    by_ref = {member["adapter"]: member for member in newest["members"]}
    for task, member in zip(POOL, gates.members, strict=True):
        shown = by_ref[str(world.adapters[task])]
        assert (shown["weights_hash"], shown["stale"]) == (member.weights_hash, False)
        assert shown["vectors"] == len(member.vectors)
    text = run("prototypes", "show", "gates").stdout
    for part in ("gates@2\n", "refined from gates@1", "lr=0.001 mask=true", "loss=0.5", "seed         7", "sha256 ddd"):
        assert part in text


def test_python_gives_the_vectors_under_references(home: Path, world: World, gates: Prototypes) -> None:
    with Hub(home) as hub:
        found = hub.prototypes.get("gates@1")
    given = {str(world.adapters[member.name]): member for member in gates.members}
    assert {member.name for member in found.members} == set(given)
    for member in found.members:
        for module, vector in given[member.name].vectors.items():
            np.testing.assert_array_equal(member.vectors[module], vector)
    assert (found.parent, found.seed, found.hyperparameters) == ("arrow", 7, gates.hyperparameters)


def test_diff_is_with_the_parent(run: Run, run_json: Json, gates: Prototypes) -> None:
    found = run_json("prototypes", "diff", "gates")
    assert (found["child"], found["parent"], found["notes"]) == ("gates@2", "gates@1", [])
    moved = nearby(gates)
    every = []
    for module in found["modules"]:
        cosines = []
        for own, other in zip(moved.members, gates.members, strict=True):
            if module["module"] in own.vectors:
                a, b = (each.vectors[module["module"]].astype(np.float64) for each in (own, other))
                cosines.append(sum(a * b) / np.sqrt(sum(a * a)) / np.sqrt(sum(b * b)))
        assert module["shared"] == len(cosines)
        assert module["mean"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
        assert module["min"] == pytest.approx(min(cosines), rel=1e-9)
        every += cosines
    assert len(every) == sum(len(member.vectors) for member in gates.members)
    assert found["mean"] == pytest.approx(sum(every) / len(every), rel=1e-9)
    assert {module["shared"] for module in found["modules"]} == {1, 3}
    text = run("prototypes", "diff", "gates@2", "gates@2").stdout
    assert text.endswith("\ngates@2 and gates@2: mean cosine 1.0000 over all modules and adapters.\n")
    assert text.splitlines()[1].split()[1:] == ["1.000", "1.000", "1"]


def test_diff_with_arrow_knows_no_sign(run_json: Json, home: Path, gates: Prototypes) -> None:
    with Hub(home) as hub:
        prototypes, records = trained(hub, parent="arrow")
        turned = []
        for member in prototypes.members:
            spectra = hub.show(member.name).spectra
            directions = {module: spectra[module].direction for module in member.vectors}
            turned.append(replace(member, vectors={m: -3 * v for m, v in directions.items() if v is not None}))
        hub.prototypes.save("turned", replace(prototypes, members=tuple(turned)), records)
    found = run_json("prototypes", "diff", "turned")
    assert (found["child"], found["parent"], found["notes"]) == ("turned@1", "arrow", [])
    assert found["mean"] == pytest.approx(1, abs=1e-6)
    assert {(module["shared"], round(module["min"], 5)) for module in found["modules"]} == {(1, 1.0), (3, 1.0)}
    other = run_json("prototypes", "diff", "gates@2", "arrow")
    assert 0 < other["mean"] < 0.5
    assert run_json("prototypes", "diff", "gates@1")["parent"] == "arrow"


def test_a_file_goes_to_another_catalog_and_back(
    run: Run, run_json: Json, world: World, home: Path, gates: Prototypes, tmp_path: Path
) -> None:
    files = [tmp_path / f"gates-{version}.safetensors" for version in (1, 2)]
    for version, file in enumerate(files, 1):
        done = run_json("prototypes", "export", f"gates@{version}", file)
        assert (done["set"], done["file"]) == (f"gates@{version}", str(file))
    assert [read_prototypes(file).parent for file in files] == ["arrow", "gates@1"]

    # The same adapters under other names.
    elsewhere, other = tmp_path / "elsewhere", tmp_path / "other-home"
    for task in POOL:
        shutil.copytree(world.adapters[task], elsewhere / f"my-{task}")
    assert invoke(["sync", elsewhere, "--home", other]).exit_code == 0
    for file in files:
        done = invoke(["prototypes", "import", file, "gates", "--home", other])
        assert done.exit_code == 0, done.output
    assert "Stored gates@2, method maple" in done.stdout
    with Hub(other) as there, Hub(home) as here:
        assert there.prototypes.list()[1].parent == ("gates", 1)
        for version in (1, 2):
            found = {member.weights_hash: member for member in there.prototypes.get(f"gates@{version}").members}
            for member in here.prototypes.get(f"gates@{version}").members:
                moved = found[member.weights_hash]
                assert moved.name == str(elsewhere / f"my-{Path(member.name).name}")
                for module, vector in member.vectors.items():
                    np.testing.assert_array_equal(moved.vectors[module], vector)
        # A parent that is not there stays a word, and is asked for.
        assert there.prototypes.import_(files[1], "alone").version == 1
        summary = there.prototypes.import_(files[1], "alone")
        assert (summary.ref, summary.parent, summary.origin) == ("alone@2", ("gates", 1), "gates@1")
        there.prototypes.export("alone", files[0])
    assert run_json("prototypes", "import", files[0], "back")["set"] == "back@1"
    assert run_json("prototypes", "diff", "back", "gates")["mean"] == pytest.approx(1)


def test_a_parent_that_the_catalog_does_not_hold_is_only_named(
    run: Run, run_json: Json, home: Path, tmp_path: Path
) -> None:
    with Hub(home) as hub:
        prototypes, records = trained(hub, parent="gates@1")
        with pytest.raises(NotInCatalogError, match="no prototype set 'gates'"):
            hub.prototypes.save("x", prototypes, records)
        # A set of that name over another pool is not it.
        part, theirs = trained(hub, POOL[:1])
        hub.prototypes.save("gates", part, theirs)
    write_prototypes(tmp_path / "x", prototypes)
    assert run_json("prototypes", "import", tmp_path / "x", "x")["parent"] == "gates@1"
    with Hub(home) as hub:
        assert hub.prototypes.show("x").summary.parent is None
        unrelated = replace(prototypes, parent="")
        hub.prototypes.save("bare", unrelated, records)
    said = run("prototypes", "diff", "x", status=1).stderr
    assert "x@1 was refined from gates@1, whose vectors the catalog does not hold" in said
    assert "hub-router prototypes diff x@1 OTHER" in said
    assert "bare@1 was refined from no other set" in run("prototypes", "diff", "bare", status=1).stderr
    assert run_json("prototypes", "diff", "x", "gates")["parent"] == "gates@1"


def test_import_names_every_member_that_is_not_as_it_was(
    run: Run, run_json: Json, world: World, home: Path, tmp_path: Path
) -> None:
    with Hub(home) as hub:
        prototypes, _ = trained(hub)
    fine, changed, gone = prototypes.members
    changed = PrototypeMember(str(world.adapters["capitals"]), "c" * 64, changed.vectors)
    members = (fine, changed, PrototypeMember("org/gone", "9" * 64, gone.vectors), replace(fine, name="twin"))
    write_prototypes(tmp_path / "x", replace(prototypes, members=members))
    said = run("prototypes", "import", tmp_path / "x", "gates", status=1).stderr
    for text in (
        f"{tmp_path / 'x'} cannot be imported, 3 of its 4 adapters",
        f"{world.adapters['capitals']} has other weights here: sha256 ",
        "expected cccccccccccc",
        "org/gone is not in the catalog, nor is another adapter with its weights",
        f"members 'colours' and 'twin' are one adapter here, {world.adapters['colours']}",
        "hub-router sync",
    ):
        assert text in said
    assert run_json("prototypes", "list") == {"sets": []}


def test_of_adapters_with_equal_weights_the_one_of_the_name_is_taken(home: Path, world: World, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(world.adapters["colours"], tmp_path / "colours-copy"))
    with Hub(home) as hub:
        hub.sync(twin)
        records = {"a": hub.show(str(twin)).record, "b": hub.show(str(world.adapters["colours"])).record}
        vectors = {name: {"m": np.full(2, number, dtype=np.float32)} for number, name in enumerate(records, 1)}
        members = tuple(PrototypeMember(name, records[name].weights_hash, vectors[name]) for name in records)
        hub.prototypes.save("both", Prototypes("maple", "org/base", members), records)
        hub.prototypes.export("both", tmp_path / "both")
        hub.prototypes.import_(tmp_path / "both", "again")
        found = {member.name: member.vectors["m"][0] for member in hub.prototypes.get("again").members}
    assert found == {str(twin): 1, str(world.adapters["colours"]): 2}


@pytest.fixture
def changing(home: Path, base_model: Path, tmp_path: Path) -> AdapterRecord:
    """An adapter of which a set is made before its weights change."""
    folder = tmp_path / "mine"
    save_adapter(base_model, folder, "colours", seed=50)
    with Hub(home) as hub:
        hub.sync(folder)
        hub.index("offline")
        before = hub.show(str(folder)).record
        prototypes, records = trained(hub, ("mine", "capitals"), parent="arrow")
        hub.prototypes.save("gates", prototypes, records)
        save_adapter(base_model, folder, "colours", seed=51)
        hub.sync(folder)
        now = hub.show(str(folder)).record
        assert (now.weights_hash != before.weights_hash, now.id != before.id) == (True, True)
        both = {"old": before, "new": now}
        vectors = prototypes.members[0].vectors
        pair = tuple(PrototypeMember(name, record.weights_hash, vectors) for name, record in both.items())
        hub.prototypes.save("both", replace(prototypes, members=pair), both)
    return before


def test_changed_weights_are_refused_and_shown(
    run: Run, run_json: Json, home: Path, changing: AdapterRecord, tmp_path: Path
) -> None:
    with Hub(home) as hub:
        with pytest.raises(StaleFeaturesError, match=f"made for other weights of: {changing.ref};"):
            hub.prototypes.get("gates")
        kept = hub.prototypes.get("gates", stale=True)
        # Two revisions of one adapter are told apart.
        both = hub.prototypes.get("both", stale=True)
    assert {member.name: member.weights_hash for member in kept.members}[changing.ref] == changing.weights_hash
    assert f"{changing.ref}@{changing.revision[:12]}" in [member.name for member in both.members]
    assert {entry["name"]: entry["stale"] for entry in run_json("prototypes", "list")["sets"]} == {
        "both": [changing.ref],
        "gates": [changing.ref],
    }
    shown = run_json("prototypes", "show", "gates")
    assert {member["adapter"]: member["stale"] for member in shown["members"]}[changing.ref] is True
    done = run("prototypes", "show", "gates")
    assert f"gates@1 was made for other weights of: {changing.ref}" in done.stderr
    assert "other weights" in done.stdout
    file = tmp_path / "gates.safetensors"
    assert "trained anew: hub-router train" in run("prototypes", "export", "gates", file).stderr
    assert {member.weights_hash for member in read_prototypes(file).members} == {m.weights_hash for m in kept.members}
    said = run("prototypes", "import", file, "gates", status=1).stderr
    assert f"{changing.ref} has other weights here" in said
    # Spectra of the weights that the set was made for are still there.
    found = run_json("prototypes", "diff", "gates")
    assert found["notes"] == [f"gates@1 was made for other weights of: {changing.ref}"]
    assert {module["shared"] for module in found["modules"]} == {2}


def test_diff_names_what_is_not_indexed_and_what_differs(run: Run, home: Path, world: World, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    save_adapter(world.base, fresh, "capitals", seed=60)
    with Hub(home) as hub:
        hub.sync(fresh)
        record = hub.show("fresh").record
        other, records = trained(hub)
        vectors = other.members[0].vectors
        member = PrototypeMember("fresh", record.weights_hash, vectors)
        hub.prototypes.save("more", replace(other, members=(*other.members, member)), {**records, "fresh": record})
        hub.prototypes.save("one", replace(other, members=(member,), base_model="org/other"), {"fresh": record})
        hub.prototypes.save("apart", other, records)
    done = run("prototypes", "diff", "more", "arrow")
    assert f"Note: {fresh} is left out: no spectra" in done.stderr
    said = run("prototypes", "diff", "one", "arrow", status=1).stderr
    assert "one@1 and arrow share no adapter" in said
    assert "hub-router index" in said
    said = run("prototypes", "diff", "one", "apart", status=1).stderr
    for text in ("the base models differ: org/other and ", f"one@1: {fresh}", "apart@1: ", "colours"):
        assert text in said


@pytest.mark.parametrize("name", ["", " x", "a@1", "x" * 55, "a/b", "x.safetensors", "arrow", "a\nb"])
def test_names_that_cannot_be_told_from_other_things(home: Path, name: str, tmp_path: Path) -> None:
    with Hub(home) as hub:
        prototypes, records = trained(hub)
        with pytest.raises(HubRouterError, match="prototype set name"):
            hub.prototypes.save(name, prototypes, records)
        with pytest.raises(HubRouterError, match="prototype set name"):
            hub.prototypes.import_(tmp_path / "x", name)


def test_save_names_every_fault_and_stores_nothing(home: Path) -> None:
    with Hub(home) as hub:
        prototypes, records = trained(hub, seed=3)
        members = (*prototypes.members[:2], replace(prototypes.members[2], weights_hash="0" * 64))
        wrong = replace(prototypes, members=members, hyperparameters={"lr": float("nan")})
        with pytest.raises(HubRouterError) as caught:
            hub.prototypes.save("gates", wrong, {name: records[name] for name in ("capitals", "moods")})
        for text in (
            "prototype set 'gates' cannot be stored",
            "hyperparameters: got {'lr': nan}",
            "member 'colours' has no adapter record; those given: capitals, moods",
            "member 'moods' was made for weights 000000000000, but ",
        ):
            assert text in str(caught.value)
        with pytest.raises(HubRouterError, match="members 'colours' and 'capitals' and 'moods' are one adapter"):
            twins = tuple(replace(member, weights_hash=records["colours"].weights_hash) for member in members)
            hub.prototypes.save("gates", replace(prototypes, members=twins), dict.fromkeys(POOL, records["colours"]))
        assert hub.prototypes.list() == []


def test_errors_say_what_there_is(run: Run, gates: Prototypes, tmp_path: Path) -> None:
    said = run("prototypes", "show", "gate", status=1).stderr
    assert "no prototype set 'gate' among 1; closest: gates; see: hub-router prototypes list" in said
    assert "'gates' has no version 7; it has: 1, 2" in run("prototypes", "export", "gates@7", "x", status=1).stderr
    (tmp_path / "diary").write_text("dear diary")
    said = run("prototypes", "export", "gates", tmp_path / "diary", status=1).stderr
    assert "holds something that is no prototype set" in said
    assert (tmp_path / "diary").read_text() == "dear diary"
    said = run("prototypes", "import", tmp_path / "diary", "x", status=1).stderr
    assert f"{tmp_path / 'diary'} cannot be read" in said
    said = run("prototypes", "import", tmp_path / "none", "x", status=1).stderr
    assert "hub-router prototypes export" in said
    assert run("prototypes", "export", "gates", status=2).stderr.count("FILE") >= 1


def test_hostile_text_of_a_file_does_not_reach_the_terminal(run: Run, home: Path, tmp_path: Path) -> None:
    with Hub(home) as hub:
        prototypes, _ = trained(hub)
    with pytest.raises(ArtifactError, match="printable"):
        write_prototypes(tmp_path / "x", replace(prototypes, method="\x1b[31mred"))
    write_prototypes(tmp_path / "x", replace(prototypes, hyperparameters={"a": "\x1b[31mred"}))
    run("prototypes", "import", tmp_path / "x", "red")
    assert "\x1b" not in run("prototypes", "show", "red").stdout
