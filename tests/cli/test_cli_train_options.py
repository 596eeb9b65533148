"""What ``train`` is given: a config, a collection, data of several kinds, settings; and one run at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World, save_adapter

from hub_router.demo.hubserver import Answer, LoopbackHub
from hub_router.training import checkpoint
from hub_router.training.lock import held
from hub_router.training.registry import RECIPES

POOL = ("colours", "capitals", "moods")
QUICK = ("--set", "steps=3", "--set", "batch_size=4")
ROWS = [("Is it blue?", "yes", name) for name in POOL] * 2
LONG = ("--set", "steps=4000", "--set", "batch_size=1", "--set", "save_every=1")


def write_rows(path: Path, rows: list[tuple[str, str, str]], columns: str = "question,answer,task") -> Path:
    path.write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return path


def save_config(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- a config


def test_a_config_says_all_and_what_is_typed_wins(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    config = save_config(
        tmp_path / "run.toml",
        f'method = "maple"\nname = "filed"\nadapters = {list(POOL)}\nbase-model = "wrong"\n'
        'per-task = 1\ndry-run = true\n[set]\nsteps = 7\nmask = "none"\nbatch_size = 2\n',
    )
    assert "'wrong'" in run("train", "--config", config, status=1).stderr
    text = config.read_text().replace('base-model = "wrong"\n', "")
    save_config(config, text)
    made = run_json("train", "--config", config)
    assert (made["name"], made["adapters"], made["steps"], made["version"]) == ("filed", list(POOL), 7, None)
    made = run_json("train", "--config", config, "--set", "steps=5", "--name", "typed", "--adapters", "colours,moods")
    assert (made["name"], made["adapters"], made["steps"]) == ("typed", ["colours", "moods"], 5)
    assert run_json("train", "--config", config, "--set", "epochs=2", "--set", "steps=null")["steps"] == 3
    save_config(config, text.replace("dry-run = true\n", ""))
    assert run_json("train", "--config", config, "--set", "steps=1")["prototypes"] == "filed@1"
    hyperparameters = run_json("prototypes", "show", "filed")["hyperparameters"]
    assert "mask='none'" in hyperparameters["recipe"] and hyperparameters["batch_size"] == 2


def test_every_wrong_entry_of_a_config_is_named_at_once(run: Run, tmp_path: Path) -> None:
    config = save_config(
        tmp_path / "run.toml",
        'method = "maple"\nadapter = ["colours"]\nadapters = "moods"\nlimit = "3"\ndry-run = "yes"\nset = ["a=1"]\n'
        "restart = true\nhome = 3\nname = 5\n",
    )
    errors = run("train", "--config", config, status=1).stderr
    for key in ("adapter", "adapters", "limit", "dry-run", "set", "restart", "home", "name"):
        assert f"  - {key}: " in errors
    assert "its keys are those of the command line: method, name, adapters," in errors
    save_config(config, "method = maple")
    assert "cannot be read as TOML" in run("train", "--config", config, status=1).stderr
    assert "does not exist" in run("train", "--config", tmp_path / "none.toml", status=2).stderr


def test_data_that_are_typed_replace_the_columns_of_a_config(
    run: Run, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.csv", ROWS)
    config = save_config(
        tmp_path / "run.toml",
        f'method = "maple"\nadapters = {list(POOL)}\ndata = "{rows}"\ncolumn = "question"\noutput-column = "answer"\n'
        'split = "train"\n',
    )
    assert run_json("train", "--config", config, "--dry-run")["examples"] == 6
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"input": "a", "output": "b", "adapter": "moods"}) + "\n")
    assert run_json("train", "--config", config, "--dry-run", "--data", lines)["examples"] == 1
    assert "has no column 'text'" in run("train", "--config", config, "--column", "text", status=1).stderr


# --- a pool


def test_adapters_may_be_arguments_as_for_compose(run_json: Callable[..., Any]) -> None:
    made = run_json("train", "maple", "a=colours", "moods", "--adapters", "capitals", "--dry-run")
    assert made["adapters"] == ["a", "moods", "capitals"]


HEAD = 'name = "own"\ntitle = "Mine"\ndescription = "d"\nlicence = "mit"\nconfidence = "A"\n'


def test_a_collection_is_the_pool_and_what_is_not_synced_is_named(
    run: Run, run_json: Callable[..., Any], world: World, home: Path, tmp_path: Path
) -> None:
    from test_cli_collections import sync

    shelf = tmp_path / "shelf" / "owner"
    for name in ("colours", "moods", "lib/capitals", "lib/sums", "closed"):
        shutil.copytree(world.adapters[Path(name).name if name != "closed" else "sums"], shelf / name)
    names = ["owner/colours", "owner/moods", "owner/lib", "owner/closed"]
    own = save_config(tmp_path / "own.toml", HEAD + f"repos = {names}\n")
    never = run("train", "maple", "--collection", own, "--dry-run", status=1).stderr
    assert "4 of 4 adapters of collection 'own' are not in the catalog: owner/colours, " in never
    assert f"run: hub-router sync --collection {own}" in never
    with LoopbackHub(tmp_path / "shelf") as hub:
        hub.gated["owner/closed"] = {"a-token"}
        sync(home, hub, "owner/colours", "owner/lib", "owner/closed")
        some = run("train", "maple", "--collection", own, "--dry-run", status=1).stderr
        assert "1 of 5 adapters" in some and "owner/moods; run" in some
        sync(home, hub, "owner/moods")
    made = run_json("train", "maple", "--collection", own, "--base", world.base, "--dry-run")
    assert made["adapters"] == ["colours", "moods", "capitals", "sums"]
    pattern = save_config(tmp_path / "pattern.toml", HEAD + 'author = "Owner"\nprefix = "Co"\n')
    made = run_json("train", "lora-mixer", "--collection", pattern, "--base", world.base, "--dry-run")
    assert len(made["adapters"]) == 1
    lone = save_config(tmp_path / "lone.toml", HEAD + 'repos = ["owner/closed"]\n')
    assert "were refused: owner/closed" in run("train", "maple", "--collection", lone, status=1).stderr


# --- data


def test_a_file_of_columns(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    columns = ("--column", "question", "--output-column", "answer")
    rows = write_rows(tmp_path / "rows.csv", ROWS)
    made = run_json("train", "maple", *POOL, "--data", rows, *columns, *QUICK)
    assert (made["examples"], made["prototypes"]) == (6, "maple@1")
    named = write_rows(tmp_path / "named.csv", ROWS, "question,answer,of")
    again = run_json("train", "maple", *POOL, "--data", named, *columns, "--adapter-column", "of", "--dry-run")
    assert again["examples"] == 6
    plain = write_rows(tmp_path / "plain.csv", ROWS, "input,output,adapter")
    assert run_json("train", "phatgoose", *POOL, "--data", plain, "--dry-run")["examples"] == 6
    bad = write_rows(tmp_path / "bad.csv", [*ROWS, ("x", "", "moods"), ("x", "y", "nobody"), ("x", "y", "rest")])
    errors = run("train", "maple", *POOL, "--data", bad, *columns, status=1).stderr
    assert "3 rows are no examples" in errors
    assert [f"row {number}:" in errors for number in (6, 7, 8, 9)] == [False, True, True, True]
    assert errors.count("colours, capitals, moods") == 1
    assert "--data" in run("train", "maple", *POOL, *columns, status=1).stderr
    assert "is no file" in run("train", "maple", *POOL, "--data", "owner/none.jsonl", status=1).stderr


def test_at_most_so_many_of_each_task(run_json: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    rows = [(f"Is it {number}?", "yes", name) for name in POOL for number in range(9)]
    path = write_rows(tmp_path / "rows.csv", rows, "input,output,task")
    made = run_json("train", "maple", *POOL, "--data", path, "--per-task", 4, "--dry-run")
    assert made["examples"] == 12
    assert made["notes"] == ["15 examples are left out: at most 4 of each task, each input once"]
    assert (
        "15 examples are left out" in run("train", "maple", *POOL, "--data", path, "--per-task", 4, "--dry-run").stderr
    )


class DatasetHub(LoopbackHub):
    """Serves its repositories as datasets; the Hub's protocol for them differs in the addresses alone."""

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        as_model = re.sub(r"^/datasets/", "/", re.sub(r"^/api/datasets/", "/api/models/", target))
        return super().answer(method, as_model, headers, body)


def test_a_dataset_of_the_hub_may_hold_more_than_the_pool(home: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "hub" / "own" / "tasks"
    shelf.mkdir(parents=True)
    write_rows(shelf / "train.csv", [*ROWS, ("Why?", "so", "another"), ("Why?", "", "moods")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with DatasetHub(tmp_path / "hub") as server:
        command = [sys.executable, "-m", "hub_router", "train", "maple", *POOL, "--data", "own/tasks", "--dry-run"]
        columns = ["--column", "question", "--output-column", "answer", "--json", "--home", str(home)]
        done = subprocess.run(
            [*command, *columns],
            env={**environment, "HF_ENDPOINT": server.endpoint},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["examples"] == 6
    assert made["notes"] == [
        "2 rows of dataset own/tasks, split train are no examples, the first is row 7: adapter 'another' is not in the "
        "pool"
    ]
    assert done.stderr == ""  # no lines of progress either


def test_data_may_call_adapters_by_what_tells_them_apart(
    run: Run, run_json: Callable[..., Any], world: World, tmp_path: Path
) -> None:
    for name in POOL:
        shutil.copytree(world.adapters[name], tmp_path / "many" / f"tiny_lora-{name}")
    run("sync", tmp_path / "many")
    path = write_rows(tmp_path / "rows.csv", ROWS, "input,output,task")
    pool = [f"tiny_lora-{name}" for name in POOL]
    assert run_json("train", "maple", *pool, "--data", path, "--dry-run")["examples"] == 6


def test_lines_without_an_adapter(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": f"Is it {n}?", "output": "yes"}) + "\n" for n in range(5)))
    for method in ("maple", "phatgoose"):
        errors = run("train", method, *POOL, "--data", data, status=1).stderr
        assert "5 lines are no examples" in errors and "line 5: no adapter named" in errors
    assert run_json("train", "lora-mixer", *POOL, "--data", data, *QUICK)["examples"] == 5
    assert run_json("train", "mole", *POOL, "--data", data, *QUICK)["examples"] == 5
    assert run_json("train", "maple", *POOL, "--data", data, *QUICK, "--set", "mask=none")["examples"] == 5
    equal_ranks = ("colours", "moods")
    assert run_json("train", "lorahub", *equal_ranks, "--data", data, "--set", "steps=3")["steps"] == 3
    made = run_json("train", "shared", *POOL, "--data", data, "--out", tmp_path / "out", *QUICK, "--set", "r=2")
    assert made["examples"] == 5


# --- settings


@pytest.mark.parametrize("method", [*RECIPES, "shared", "ewora"])
def test_settings_are_listed_with_the_defaults_of_the_method(
    run: Run, run_json: Callable[..., Any], method: str
) -> None:
    found = {each["name"]: each for each in run_json("train", method, "--settings")["settings"]}
    shown = run("train", method, "--settings").stdout
    assert all(re.search(rf"^{name} ", shown, re.MULTILINE) for name in found)
    assert all(each["help"] for each in found.values()), [each for each in found.values() if not each["help"]]
    default = {name: each["default"] for name, each in found.items()}
    wanted: dict[str, dict[str, Any]] = {
        "maple": {"epochs": 1.0, "warmup": 0.06, "mask": "after", "parent": "arrow", "learning_rate": 1e-3},
        "phatgoose": {"steps": 100, "top_k": 2},
        "lora-mixer": {"balance": "rsl", "alpha": 0.1, "entropy_weight": 0.05, "top_k": 3},
        "lorahub": {"steps": 40, "shots": 5, "bound": 1.5},
        "mole": {"balance": "aux", "alpha": 0.1},
        "shared": {"learning_rate": 1e-4, "r": 8, "target_modules": "all-linear"},
        "ewora": {"r": 32, "n": 4, "lora_alpha": 32},
    }
    assert wanted.get(method, {}).items() <= default.items()
    assert ("epochs" in found) is (method != "lorahub")


def test_what_is_listed_can_be_set(run: Run, run_json: Callable[..., Any]) -> None:
    for method in ("maple", "lora-mixer", "lorahub"):
        pool = ("colours", "moods")
        found = run_json("train", method, "--settings")["settings"]
        given = [f"{each['name']}={json.dumps(each['default'])}" for each in found if each["default"] not in (None, "")]
        assert given
        run("train", method, *pool, "--dry-run", *(part for pair in given for part in ("--set", pair)))
    assert "'arrow' is not trained" in run("train", "arrow", "--settings", status=1).stderr


def test_every_method_that_is_trained_is_named_in_the_help(run: Run) -> None:
    text = " ".join(run("train", "--help").stdout.split())
    assert all(re.search(rf"\b{method}\b", text.partition("Options:")[0]) for method in RECIPES)


@pytest.mark.parametrize("name", ["epochs", "learning_rate", "schedule", "patience", "accumulation"])
def test_settings_that_would_do_nothing_are_refused(run: Run, name: str) -> None:
    errors = run("train", "lorahub", "colours", "moods", "--dry-run", "--set", f"{name}=1", status=1).stderr
    assert f"lorahub searches without gradients, so {name} would do nothing" in errors
    assert "hub-router train lorahub --settings" in errors


# --- what a dry run checks


@pytest.mark.parametrize("kind", ["shared", "ewora"])
def test_a_dry_run_of_an_adapter(run: Run, run_json: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out" / "made"
    given = ("train", kind, "--out", out, *POOL, "--set", "batch_size=2", "--set", "epochs=3")
    planned = run_json(*given, "--dry-run")
    assert (planned["kind"], planned["loss"], planned["steps"]) == (kind, None, 5)
    assert not out.parent.exists()
    assert run_json(*given)["steps"] == planned["steps"]
    assert "exists" in run(*given, "--dry-run", status=1).stderr
    other = ("train", kind, "--out", tmp_path / "other", *POOL, "--dry-run")
    assert "cannot put the adapter" in run(*other, "--set", 'target_modules=["nothing"]', status=1).stderr
    assert "there are no settings rr of" in run(*other, "--set", "rr=1", status=1).stderr
    assert "'schedule" not in run(*other, "--set", "schedule=cosine").stderr


def test_a_dry_run_tokenizes_the_data(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input": "a", "output": "yes " * 5000, "adapter": "moods"}) + "\n")
    errors = run("train", "maple", *POOL, "--data", data, "--dry-run", status=1).stderr
    assert "an answer longer than the model's" in errors


def kill_when_saved(home: Path, name: str, arguments: list[str]) -> Path:
    """A run that is killed as soon as it has a checkpoint; the checkpoint."""
    path = home / "training" / f"{name}.run" / "training.pt"
    process = start(home, arguments)
    wait_for(path.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return path


def start(home: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hub_router", *arguments, "--home", str(home)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_dry_run_says_what_a_stopped_run_means(run: Run, run_json: Callable[..., Any], home: Path) -> None:
    given = ["train", "maple", "--name", "gates", *POOL, *LONG]
    path = kill_when_saved(home, "gates", given)
    assert run_json(*given, "--dry-run")["notes"] == [f"a run in {path.parent}, stopped or still going, would go on"]
    other = run(*given, "--dry-run", "--set", "mask=none", status=1).stderr
    assert "is a checkpoint of another run:" in other and "was stopped" in other
    assert "--restart" in other and "mask='after'" in other and "mask='none'" in other
    errors = run(*given[:-2], "--set", "learning_rate=0.5", "--dry-run", status=1).stderr
    assert "learning_rate: 0.001, now 0.5" in errors and "base weights" not in errors
    assert run_json(*given, "--dry-run", "--set", "mask=none", "--restart")["notes"] == []
    assert path.exists()
    checks = {check["name"]: check for check in run_json("doctor", status=1)["checks"]}  # there is no Hub here
    assert "gates" in checks["training"]["detail"]


def test_a_set_of_another_base_model_gives_a_note(
    run: Run, run_json: Callable[..., Any], world: World, tmp_path: Path
) -> None:
    run("train", "maple", "--name", "first", *POOL, *QUICK)
    copy = shutil.copytree(world.base, tmp_path / "copy")
    given = ("train", "maple", *POOL, "--set", "prototypes=first", "--dry-run")
    assert run_json(*given)["notes"] == []
    note = f"first@1 was trained on {world.base}, and this run is on {copy}"
    assert run_json(*given, "--base", copy)["notes"] == [note]
    assert f"Note: {note}." in run(*given, "--base", copy).stderr
    run("prototypes", "export", "first", tmp_path / "first.safetensors")
    filed = ("--set", f"prototypes={tmp_path / 'first.safetensors'}")
    assert "was trained on" in run_json("train", "maple", *POOL, *filed, "--dry-run", "--base", copy)["notes"][0]


# --- one run at a time


@pytest.fixture
def running(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A run that takes its time, past its first checkpoint."""
    arguments = ["train", "maple", "--name", "gates", *POOL, *LONG]
    process = start(home, arguments)
    try:
        wait_for((home / "training" / "gates.run" / "training.pt").exists, process)
        yield process, arguments
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_the_same_run_does_not_go_on_twice(
    run: Run, run_json: Callable[..., Any], home: Path, running: tuple[subprocess.Popen[bytes], list[str]]
) -> None:
    process, arguments = running
    refused = run(*arguments, status=1).stderr
    assert f"process {process.pid} on " in refused
    assert str(home / "training" / "gates.run") in refused
    restarted = run(*arguments, "--restart", status=1).stderr
    assert f"process {process.pid} on " in restarted
    assert process.poll() is None
    assert (home / "training" / "gates.run" / "training.pt").exists()
    assert run_json("train", "maple", "--name", "other", *POOL, *QUICK)["prototypes"] == "other@1"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_json(*arguments[: -len(LONG)], *QUICK, "--restart")
    assert done["prototypes"] == "gates@1"
    assert not list((home / "training").iterdir())


def test_a_folder_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    from hub_router.errors import TrainingError

    folder = tmp_path / "run"
    with held(folder):
        with pytest.raises(TrainingError, match=f"process {os.getpid()} on"), held(folder):
            pass
        checkpoint.save(folder, {}, {})
        with held(tmp_path / "another"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    with pytest.raises(KeyError), held(folder):
        raise KeyError
    with held(folder):
        pass


def test_of_a_run_of_several_processes_the_first_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with held(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "run"):
            pass


def test_restart_of_an_adapter_forgets_the_stopped_run(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "made"
    checkpoint.save(tmp_path / ".made.training", {"data": "another", "settings": {}}, {})
    given = ("train", "shared", "--out", out, *POOL, *QUICK, "--set", "r=2")
    assert "another run" in run(*given, "--dry-run", status=1).stderr
    assert "another run" in run(*given, status=1).stderr
    assert run_json(*given, "--restart")["steps"] == 3
    assert [path.name for path in tmp_path.iterdir() if "made" in path.name] == ["made"]


def test_other_weights_of_an_adapter_are_another_run(run: Run, home: Path, world: World, tmp_path: Path) -> None:
    own = tmp_path / "own" / "moods"
    shutil.copytree(world.adapters["moods"], own)
    run("sync", own)
    given = ["train", "maple", "--name", "gates", "colours", str(own), *LONG]
    kill_when_saved(home, "gates", given)
    shutil.rmtree(own)
    save_adapter(world.base, own, "moods", seed=9)
    run("sync", own)
    assert "adapters: " in run(*given, "--dry-run", status=1).stderr


def test_a_run_of_two_processes_stores_one_set(run_json: Callable[..., Any], home: Path) -> None:
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hub_router"]
    given = ["train", "maple", "--name", "gates", *POOL, *QUICK, "--home", str(home)]
    done = subprocess.run([sys.executable, *distributed, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Stored gates@1: ") == 2
    assert [(each["name"], each["version"]) for each in run_json("prototypes", "list")["sets"]] == [("gates", 1)]
    assert not list((home / "training").iterdir())
