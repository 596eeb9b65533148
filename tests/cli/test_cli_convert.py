"""``sync --convert-rank``: adapters of other PEFT types, from a Hub on loopback and from folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_world import invoke
from test_cli_sync import Console

from hub_router import Hub, compose
from hub_router.cli.sync import is_met
from hub_router.demo.hubserver import LoopbackHub

LOHA, MISS, IA3 = "owner/many/loha", "owner/miss", "owner/ia3"
CARD = "---\nlicense: mit\ntags: [sums, 'ü🤗']\n---\n# Sums\n\nAdds two numbers up.\n"


def save(base: Path, folder: Path, config: Any) -> None:
    """An adapter of another type as PEFT saves it, with random factors, a card and samples."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".hada_", ".miss_", ".ia3_")):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "samples.jsonl").write_text('{"input": "one and one", "output": "two"}\n')
    (folder / "test.jsonl").write_text('{"input": "two and two", "output": "four"}\n')


@pytest.fixture(scope="module")
def others(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub's repositories with a LoHa, a MiSS and an IA3 adapter."""
    from peft import IA3Config, LoHaConfig, MissConfig

    top = tmp_path_factory.mktemp("others")
    targets = ["q_proj", "v_proj", "down_proj"]
    save(base_model, top / LOHA, LoHaConfig(r=4, alpha=6, target_modules=targets))
    save(base_model, top / MISS, MissConfig(r=5, target_modules=targets))
    save(base_model, top / IA3, IA3Config(target_modules=targets, feedforward_modules=["down_proj"]))
    return top


@pytest.fixture
def shelf(others: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(others, tmp_path / "shelf"))


@pytest.fixture
def hub(shelf: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(shelf) as hub:
        yield hub


@pytest.fixture
def console(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    return Console(hub, tmp_path, monkeypatch)


def by_name(document: Any) -> dict[str, tuple[str, str]]:
    """Outcome and reason by the last part of the reference; of a conversion, without its hash."""
    found = {}
    for line in document["outcomes"]:
        name = "/".join(part for part in (line["repo_id"], line["subfolder"]) if part).rpartition("/")[2]
        found[name[:-9] if "converted" in line["repo_id"] else name] = (line["outcome"], line["reason"])
    return found


def converted(console: Console, name: str) -> Path:
    (found,) = (console.home / "converted").glob(f"{name}-????????")
    return found


def test_without_the_option_the_hint_names_the_command(console: Console) -> None:
    done = console("sync", LOHA, MISS, IA3, status=1)
    lines = [line for line in done.stderr.splitlines() if "--convert-rank" in line]
    assert lines == [
        f"Of other PEFT types that can be converted to LoRA: 2; try: hub-router sync {LOHA} --convert-rank 16"
    ]
    assert not (console.home / "converted").exists()
    assert "--convert-rank" not in console("sync", IA3, status=1).stderr


def test_adapters_of_a_hub_are_converted_once(console: Console, base_model: Path) -> None:
    first = console.json("sync", LOHA, MISS, "--convert-rank", 6)
    assert (first["counts"]["added"], first["counts"]["unsupported"], first["counts"]["failed"]) == (2, 2, 0)
    told = by_name(first)
    assert told["loha"][0] == told["miss"][0] == "unsupported"
    assert "not converted" not in told["loha"][1] + told["miss"][1]
    outcome, note = told["owner--many--loha"]
    record = json.loads((converted(console, "owner--many--loha") / "conversion.json").read_text())
    assert outcome == "added"
    assert note.startswith(
        f"converted from {LOHA} (LOHA) by PEFT {record['peft_version']} at rank 6: relative error at"
    )
    assert f"{record['worst']:.2g} (" in note
    assert 0 < record["median"] <= record["worst"] < 1
    assert set(record["modules"]) == {
        f"model.layers.{layer}.{name}"
        for layer in range(4)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    # MiSS is LoRA of its own rank, exactly.
    assert "at rank 5: relative error at most 0 (" in told["owner--miss"][1]

    again = console.json("sync", LOHA, MISS, "--convert-rank", 6)
    assert (again["counts"]["unchanged"], again["counts"]["added"], again["counts"]["updated"]) == (2, 0, 0)
    assert by_name(again)["owner--many--loha"] == ("unchanged", note)
    assert sorted(path.name for path in (console.home / "converted").iterdir()) == sorted(
        converted(console, name).name for name in ("owner--many--loha", "owner--miss")
    )

    with Hub(console.home) as hub:
        (loha,) = [record for record in hub.list() if "loha" in record.name]
        details = hub.show(str(loha.id))
        assert (loha.peft_type, loha.ranks, loha.licence, loha.base_model) == ("LORA", (6,), "mit", str(base_model))
        assert loha.tags == ("sums", "ü🤗")
        assert loha.extra["notes"][0] == note
        assert "Adds two numbers up." in details.card_text
        assert [(each.input, each.output, each.split) for each in details.samples] == [
            ("one and one", "two", "sample"), ("two and two", "four", "test")
        ]  # fmt: skip
        (original,) = [each for each in hub.list(statuses=("unsupported",)) if each.repo_id == "owner/many"]
        assert "convert" not in original.reason
        assert hub.list(tag="sums", licence="mit") == hub.list()


def test_composed_by_name_it_equals_peft(console: Console, shelf: Path, base_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    console("sync", LOHA, "--convert-rank", 32)
    folder = converted(console, "owner--many--loha")
    console("compose", "sums", folder.name, "--method", "single", "--set", f"adapter={folder.name}")
    ids = torch.arange(3, 15).reshape(2, 6)
    with Hub(console.home) as hub, torch.no_grad():
        got = hub.load("sums")(input_ids=ids).logits
        base = LlamaForCausalLM.from_pretrained(base_model)
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, shelf / LOHA).eval()(ids).logits
    assert (expected - plain).norm() > 0.1
    assert (got - expected).norm() / (expected - plain).norm() < 1e-4


def test_another_rank_or_source_takes_the_place_of_the_conversion(console: Console, shelf: Path) -> None:
    from safetensors.torch import load_file, save_file

    console("sync", LOHA, "--convert-rank", 2)
    assert by_name(console.json("sync", LOHA, "--convert-rank", 0.9))["owner--many--loha"][0] == "updated"
    assert "(0.9 of the energy): relative error" in console("show", converted(console, "owner--many--loha")).stdout
    file = shelf / LOHA / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert by_name(console.json("sync", LOHA, "--convert-rank", 0.9))["owner--many--loha"][0] == "updated"
    (shelf / LOHA / "README.md").write_text(CARD.replace("mit", "apache-2.0"))
    weights = converted(console, "owner--many--loha") / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert by_name(console.json("sync", LOHA, "--convert-rank", 0.9))["owner--many--loha"][0] == "updated"
    assert weights.stat().st_mtime_ns == before
    weights.unlink()
    assert by_name(console.json("sync", LOHA, "--convert-rank", 0.9))["owner--many--loha"][0] == "unchanged"
    assert weights.is_file()
    assert [record["licence"] for record in console.json("list")["adapters"]] == ["apache-2.0"]


def test_what_cannot_be_converted_says_why(console: Console, base_model: Path, shelf: Path) -> None:
    done = console("sync", LOHA, IA3, "--convert-rank", 4, status=1)
    assert f"Gave no usable adapter, or not all that they hold: {IA3}" in done.stderr
    told = by_name(console.json("sync", LOHA, IA3, "--convert-rank", 4, status=1))
    assert told["ia3"][0] == "unsupported"
    assert told["ia3"][1].endswith("; not converted: IA3, PEFT has no conversion to LoRA for it")
    config = json.loads((shelf / MISS / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(shelf / "nowhere")
    (shelf / MISS / "adapter_config.json").write_text(json.dumps(config))
    _, reason = by_name(console.json("sync", MISS, "--convert-rank", 4, status=1))["miss"]
    assert "not converted: MISS, its tensors do not tell the widths of its modules, and base model" in reason
    with Hub(console.home) as hub:
        hub.bases.set(MISS, base_model)
    assert console.json("sync", MISS, "--convert-rank", 4)["counts"]["added"] == 1


def test_folders_and_what_a_killed_run_leaves(others: Path, tmp_path: Path) -> None:
    """An unfinished conversion is no adapter, and goes once it is old."""
    home = tmp_path / "home"
    unfinished = home / "converted" / ".converting-abc" / "new"
    shutil.copytree(others / LOHA, unfinished)
    (unfinished / "adapter_model.safetensors").write_bytes(b"half")
    arguments = ["sync", others / "owner", "--home", home, "--json", "--convert-rank", "4"]
    first = json.loads(invoke(arguments).stdout)
    assert (first["counts"]["added"], first["counts"]["unsupported"]) == (2, 3)
    names = sorted(path.name[:-9] for path in (home / "converted").iterdir() if path.name[0] != ".")
    assert names == ["loha", "miss"]
    everything = json.loads(invoke(["sync", home / "converted", "--home", home, "--json"]).stdout)
    assert [line["outcome"] for line in everything["outcomes"]] == ["unchanged", "unchanged"]
    assert unfinished.is_dir()
    os.utime(unfinished.parent, (1, 1))
    assert json.loads(invoke(arguments).stdout)["counts"]["unchanged"] == 2
    assert not unfinished.parent.exists()


def test_a_dry_run_converts_nothing(others: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):
        done = invoke(["sync", others / LOHA, "--home", home, "--convert-rank", "4", "--dry-run", "--json"])
        assert json.loads(done.stdout)["counts"]["added"] == 0
        assert not (home / "converted").exists()
        invoke(["sync", others / LOHA, "--home", home])


@pytest.mark.parametrize(("rank", "status"), [("0", 1), ("1.0", 1), ("-2", 1), ("nan", 1), ("many", 2)])
def test_ranks_that_are_none_are_refused_first(rank: str, status: int, others: Path, tmp_path: Path) -> None:
    done = invoke(["sync", others / LOHA, "--home", tmp_path / "home", f"--convert-rank={rank}"])
    assert done.exit_code == status
    assert "expected a" in done.stderr
    assert json.loads(invoke(["list", "--home", tmp_path / "home", "--json"]).stdout)["adapters"] == []


def test_a_strangers_record_is_no_note(console: Console, shelf: Path, others: Path, tmp_path: Path) -> None:
    """Only what lies in the home's own folder was converted here."""
    console("sync", LOHA, "--convert-rank", 4)
    ours = converted(console, "owner--many--loha")
    claimed = shutil.copytree(ours, tmp_path / "claimed")
    shutil.copytree(ours, shelf / "owner" / "claimed")
    console("sync", claimed, "owner/claimed")
    with Hub(console.home) as hub:
        ready = hub.list()
    assert len(ready) == 3
    noted = {record.name: [note for note in record.extra["notes"] if "converted" in note] for record in ready}
    assert len(noted.pop(ours.name)) == 1
    assert set(noted) == {"claimed"}
    assert noted["claimed"] == []


@pytest.mark.parametrize(
    ("target", "reason", "outcome", "met"),
    [
        ("o/r", "converted from o/r (LOHA) by PEFT", "added", True),
        ("o/r", "converted from o/r2 (LOHA) by PEFT", "added", False),
        ("o/r", "converted from o/r (LOHA) by PEFT; x", "failed", False),
        ("o/s", "converted from o/r (LOHA) by PEFT", "added", False),
    ],
)
def test_a_conversion_meets_its_target(target: str, reason: str, outcome: str, met: bool) -> None:
    from hub_router.store.runs import Outcome
    from hub_router.sync.summary import SyncSummary

    rows = (
        Outcome("hub", "o/r", "", None, "unsupported", "LOHA"),
        Outcome("local", "/home/converted/o--r-1", "", None, outcome, reason),
    )
    assert is_met(target, SyncSummary(rows, None, False, 0, 0.0)) == met


def test_the_converted_folder_needs_no_catalog(console: Console, base_model: Path) -> None:
    from transformers import LlamaForCausalLM

    console("sync", MISS, "--convert-rank", 4)
    routed = compose(LlamaForCausalLM.from_pretrained(base_model), [converted(console, "owner--miss")], "uniform")
    assert len(routed.adapters) == 1


def test_what_was_never_fetched_is_not_looked_for_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "adapter_config.json").write_text('{"peft_type": "LORA"}' + " " * 1_100_000)
    monkeypatch.chdir(tmp_path / "here")
    with Hub(tmp_path / "home") as hub:
        from hub_router.store.repos import AdapterFields, RepoFields, save_adapter
        from hub_router.store.runs import Outcome
        from hub_router.sync.summary import SyncSummary

        # As the Hub's part of a run leaves an adapter whose config is too large to fetch.
        with hub.store.write() as session:
            save_adapter(session, RepoFields("hub", "evil/big", "a" * 40), AdapterFields("", "", reason="too large"))
        line = Outcome("hub", "evil/big", "", "a" * 40, "unsupported", "too large")
        assert hub.convertible(SyncSummary((line,), 1, False, 0, 0.0)) == []
