"""The doctor over a real catalog that is broken in one way at a time."""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from hub_router.demo.hubserver import LoopbackHub
from hub_router.doctor import Check, diagnose
from hub_router.errors import NotInCatalogError
from hub_router.hub import Hub
from hub_router.prototypes import PrototypeMember, Prototypes
from hub_router.settings import Settings
from hub_router.training import checkpoint

ADAPTERS = ("greeting", "farewell")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, two PEFT adapters as folders, and a home in which they are synced, indexed and composed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    top = tmp_path_factory.mktemp("doctor")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(top / "base")
    for name in ADAPTERS:
        model = LlamaForCausalLM.from_pretrained(top / "base")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(top / "adapters" / name)
        (top / "adapters" / name / "README.md").write_text(f"# A polite {name}")
    with Hub(top / "home") as hub:
        hub.sync(top / "adapters")
        hub.index("offline")
        hub.define("polite", ADAPTERS, "uniform")
    return top


@pytest.fixture
def world(template: Path, tmp_path: Path) -> Path:
    """A copy that a test may break, with the paths in its catalog rewritten."""
    top = Path(shutil.copytree(template, tmp_path / "world"))
    with sqlite3.connect(top / "home" / "catalog.db") as database:
        database.execute("update adapters set path = replace(path, ?, ?)", (str(template), str(top)))
        database.execute("update repos set repo_id = replace(repo_id, ?, ?)", (str(template), str(top)))
    return top


@pytest.fixture(autouse=True)
def reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that answers."""
    (tmp_path / "shelf").mkdir()
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield hub


def examine(top: Path, encoder: str | None = None) -> dict[str, Check]:
    checks = diagnose(Settings.resolve(top / "home"), encoder)
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    for check in checks:
        assert check.detail
        assert check.fix or check.ok == "ok", f"{check} names no remedy"
    return found


def faults(top: Path) -> dict[str, Check]:
    return {name: check for name, check in examine(top).items() if check.ok != "ok"}


def test_a_healthy_catalog_has_no_fault(world: Path) -> None:
    assert faults(world) == {}
    found = examine(world)
    assert "torch" in found["packages"].detail
    assert "2 ready" in found["adapters"].detail
    assert "offline" in found["encoder"].detail


def test_nothing_is_created(tmp_path: Path) -> None:
    found = examine(tmp_path / "new", encoder="offline")
    assert set(found) == {"packages", "device", "home", "downloads", "database", "hub", "token", "encoder"}
    assert "empty" in found["database"].detail
    assert not (tmp_path / "new").exists()


def test_a_file_that_vanished(world: Path) -> None:
    (world / "adapters" / "greeting" / "adapter_model.safetensors").unlink()
    found = faults(world)["adapters"]
    assert found.ok == "fail"
    assert "adapter_model.safetensors is gone" in found.detail
    assert "1 of 2" in found.detail
    assert found.fix == f"hub-router sync {world / 'adapters' / 'greeting'}"


def test_a_file_of_another_size_and_the_command_that_mends_it(world: Path) -> None:
    path = world / "adapters" / "greeting" / "README.md"
    path.write_text("# Longer than it was, and about something else")
    found = faults(world)["adapters"]
    assert f"README.md has {path.stat().st_size} bytes" in found.detail
    with Hub(world / "home") as hub:
        hub.sync(found.fix.removeprefix("hub-router sync "))
        assert set(faults(world)) == {"embeddings", "spectra"} & set(faults(world))
        assert "embeddings" in faults(world)
        hub.index()
    assert faults(world) == {}


def test_a_composition_whose_member_changed(world: Path) -> None:
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update composition_members set weights_hash = 'other' where name = 'farewell'")
    found = faults(world)
    assert set(found) == {"compositions"}
    assert found["compositions"].ok == "fail"
    assert "polite: farewell has other weights now" in found["compositions"].detail
    with Hub(world / "home") as hub:
        with pytest.raises(NotInCatalogError):
            hub.load("polite")
        hub.define("polite", ADAPTERS, "uniform", replace=True)
    assert faults(world) == {}


def test_a_composition_whose_member_is_gone(world: Path) -> None:
    shutil.rmtree(world / "adapters" / "greeting")
    assert "the folder of greeting is gone" in faults(world)["compositions"].detail


def test_prototype_sets_of_weights_that_changed(world: Path) -> None:
    with Hub(world / "home") as hub:
        records = {name: hub.show(name).record for name in ADAPTERS}
        members = tuple(
            PrototypeMember(name, record.weights_hash, {"model.layers.0.self_attn.q_proj": np.ones(16, np.float32)})
            for name, record in records.items()
        )
        for _ in range(2):
            hub.prototypes.save("polite gates", Prototypes("maple", "base", members), records)
    assert "1 sets, none stale" in examine(world)["prototypes"].detail
    weights = world / "adapters" / "greeting" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with Hub(world / "home") as hub:
        hub.sync(world / "adapters" / "greeting")
        hub.index()
    found = faults(world)["prototypes"]
    assert found.ok == "warn"
    assert "1 of 1 sets were made for other weights: polite gates@2:" in found.detail
    assert "greeting" in found.detail and "farewell" not in found.detail
    assert found.fix == "hub-router train maple --name 'polite gates' ADAPTER..."


def test_trainings_that_were_stopped(world: Path) -> None:
    assert "no run" in examine(world)["training"].detail
    folder = world / "home" / "training" / f"{quote('my/gates', safe='')}.run"
    checkpoint.save(folder, {}, {})
    found = faults(world)
    assert set(found) == {"training"}
    assert "my/gates" in found["training"].detail
    assert shlex.split(found["training"].fix.partition("rm -r ")[2]) == [str(folder)]
    checkpoint.remove(folder)
    assert faults(world) == {}


def test_stale_spectra(world: Path) -> None:
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update adapter_spectra set weights_hash = 'old' where adapter_id = 1")
    found = faults(world)
    assert set(found) == {"spectra"}
    assert "missing or stale for 1" in found["spectra"].detail
    assert found["spectra"].fix == "hub-router index"


def test_stale_embeddings(world: Path) -> None:
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update adapters set card_text = 'Counts sheep' where id = 1")
    found = faults(world)
    assert set(found) == {"embeddings"}
    assert found["embeddings"].detail == "missing or stale for 1 of 2 (offline)"
    assert found["embeddings"].fix == "hub-router index --encoder offline"


@pytest.mark.parametrize("samples", [1, 4])
def test_likelihoods_that_are_not_computed(world: Path, samples: int) -> None:
    (world / "inputs.jsonl").write_text("".join(f'{{"input": "Good day, number {n}"}}\n' for n in range(samples)))
    with Hub(world / "home") as hub:
        hub.samples.add("greeting", world / "inputs.jsonl")
        assert set(faults(world)) == {"embeddings"}
        assert hub.index().gaussians == 1
        assert faults(world) == {}
        with sqlite3.connect(world / "home" / "catalog.db") as database:
            database.execute("delete from adapter_gaussians")
        found = faults(world)
        assert set(found) == {"likelihoods"}
        assert found["likelihoods"].detail == "missing or stale for 1 adapters (offline)"
        assert found["likelihoods"].fix == "hub-router index --encoder offline"
        hub.index()
        assert faults(world) == {}
        for path in (world / "home" / "faiss").rglob("fine-directions.npy"):
            path.unlink()
        assert set(faults(world)) == {"search index"}
        hub.index()
    assert faults(world) == {}


@pytest.mark.parametrize("damage", ["removed", "cut", "garbage"])
def test_a_search_index_that_cannot_be_used_is_named_and_rebuilt(world: Path, damage: str) -> None:
    for path in (world / "home" / "faiss").rglob("*.faiss"):
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:100] if damage == "cut" else os.urandom(path.stat().st_size))
    found = faults(world)
    assert set(found) == {"search index"}
    assert found["search index"].ok == "warn"
    with Hub(world / "home") as hub:
        assert hub.search("a polite greeting", limit=1)[0].adapter.name == "greeting"
    assert faults(world) == {}


def test_a_run_that_was_cut_short_is_finished_by_the_same_request(world: Path) -> None:
    with Hub(world / "home") as hub:
        hub.sync(world / "adapters", workers=2)
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update sync_runs set finished_at = null where id = (select max(id) from sync_runs)")
    assert set(faults(world)) == {"sync"}
    with Hub(world / "home") as hub:
        hub.sync(world / "adapters" / "greeting")
    assert set(faults(world)) == {"sync"}
    with Hub(world / "home") as hub:
        hub.sync(world / "adapters", workers=3)
    assert faults(world) == {}


def test_repositories_that_are_not_served(world: Path) -> None:
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update repos set state = 'failed', reason = 'timeout' where id = 1")
    found = faults(world)["repositories"]
    assert "failed" in found.detail
    assert found.fix.startswith("hub-router sync ")


def test_a_database_of_another_release_hides_the_catalog_checks(world: Path) -> None:
    with sqlite3.connect(world / "home" / "catalog.db") as database:
        database.execute("update alembic_version set version_num = '9999'")
    found = examine(world, encoder="offline")
    assert found["database"].ok == "fail"
    assert "adapters" not in found


def test_a_database_that_is_none(world: Path) -> None:
    (world / "home" / "catalog.db").write_bytes(b"x" * 4096)
    for file in ("catalog.db-wal", "catalog.db-shm"):
        (world / "home" / file).unlink(missing_ok=True)
    assert "not a database" in examine(world, encoder="offline")["database"].detail


def test_a_hub_that_is_down(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = faults(world)
    assert set(found) == {"hub"}
    assert found["hub"].ok == "fail"
    assert "127.0.0.1:9" in found["hub"].detail


def test_offline_mode_is_said(world: Path, monkeypatch: pytest.MonkeyPatch, reachable: LoopbackHub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = faults(world)
    assert found["hub"] == Check("hub", "warn", found["hub"].detail, "unset HF_HUB_OFFLINE")
    assert reachable.requests == []


def test_the_token_is_never_shown(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    found = examine(world)
    assert found["token"].detail == "present"
    assert not any("topsecret" in check.detail + check.fix for check in found.values())


@pytest.mark.parametrize(("encoder", "ok"), [("nobody/such-model", "warn"), ("/no/such/folder", "fail")])
def test_an_encoder_that_is_not_here(world: Path, encoder: str, ok: str) -> None:
    found = examine(world, encoder)["encoder"]
    assert found.ok == ok
    assert "hub-router[offline]" in found.fix


def test_an_encoder_that_offline_mode_forbids_to_download(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert examine(world, "nobody/such-model")["encoder"].ok == "fail"


def test_the_command_that_mends_many_can_be_copied(world: Path) -> None:
    for name in ADAPTERS:
        (world / "adapters" / name / "adapter_config.json").unlink()
    command = shlex.split(faults(world)["adapters"].fix)
    assert command == ["hub-router", "sync", *(str(world / "adapters" / name) for name in sorted(ADAPTERS))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.joinpath("locked").mkdir(mode=0o500)
    assert examine(tmp_path / "locked", encoder="offline")["home"].ok == "fail"
