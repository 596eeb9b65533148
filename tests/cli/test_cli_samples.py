"""``samples``: given by file and by dataset, listed, embedded by ``index``, scored by ``eval``, kept by ``sync``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_world import TASKS, Run, World

from hub_router import Hub
from hub_router.demo.hubserver import Answer, LoopbackHub

OCEANS = ["Which ocean lies east of Africa?", "Which ocean is the deepest?", "Is the Arctic an ocean?"]


@pytest.fixture
def oceans(tmp_path: Path) -> Path:
    path = tmp_path / "oceans.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "Indian"}) + "\n" for text in OCEANS))
    return path


FIELDS = ("--input-field", "question", "--output-field", "answer")


def test_added_samples_are_embedded_found_and_removed_again(
    run: Run, run_json: Callable[..., Any], oceans: Path
) -> None:
    query = "the deepest ocean of all"
    before = run_json("search", query)["hits"]
    done = run_json("samples", "add", "capitals", oceans, *FIELDS)
    assert (done["added"], done["known"], done["replaced"], done["left_out"]) == (3, 0, 0, 0)
    assert done["origin"] == "file oceans.jsonl"
    assert run_json("index")["embedded"] == 1
    best = run_json("search", query)["hits"][0]
    assert (best["adapter"]["name"], best["kind"], best["matched"]) == ("capitals", "sample", OCEANS[1])
    assert best["score"] > before[0]["score"]
    assert run_json("index")["embedded"] == 0
    assert run_json("samples", "remove", "capitals", "--origin", "file oceans.jsonl")["removed"] == 3
    assert run_json("index")["embedded"] == 1
    assert run_json("search", query)["hits"] == before


def test_list_groups_by_split_and_origin_and_show_names_origins(
    run: Run, run_json: Callable[..., Any], oceans: Path
) -> None:
    run("samples", "add", "capitals", oceans, *FIELDS)
    prompt, answer = TASKS["capitals"][3:]
    own = {"given": False, "count": 1, "first": [{"input": prompt, "output": answer}]}
    assert run_json("samples", "list", "capitals")["origins"] == [
        {
            "split": "sample",
            "origin": "file oceans.jsonl",
            "given": True,
            "count": 3,
            "first": [{"input": text, "output": "Indian"} for text in OCEANS],
        },
        {"split": "sample", "origin": "samples.jsonl", **own},
        {"split": "test", "origin": "test.jsonl", **own},
    ]
    lines = run("samples", "list", "capitals").stdout.splitlines()
    assert lines[1].split() == ["sample", "file", "oceans.jsonl", "yes", "3"]
    assert f"  {OCEANS[0]} -> Indian" in lines
    assert f"  {OCEANS[0]} -> Indian  (file oceans.jsonl)" in run("show", "capitals").stdout.splitlines()


def test_test_samples_of_a_dataset_are_scored(
    run: Run, run_json: Callable[..., Any], world: World, tmp_path: Path
) -> None:
    table = tmp_path / "skies.csv"
    rows = [f"What colour is sky {number} ?,blue" for number in range(30)]
    table.write_text("\n".join(["sentence,label", *rows, ",blue"]) + "\n")
    options = ("--column", "sentence", "--output-column", "label", "--split", "test", "--limit", 20)
    done = run_json("samples", "add", "colours", "--dataset", table, *options)
    assert (done["added"], done["left_out"], done["unusable"]) == (20, 10, 1)
    assert done["origin"] == "dataset skies.csv/train: sentence"
    again = run("samples", "add", "colours", "--dataset", table, *options).stdout
    assert again.startswith("Added 0 samples")
    assert "20 were given before" in again
    run("compose", "mix", "colours", "--base-model", world.base)
    assert run_json("eval", "mix", "--methods", "base")["rows"][0]["samples"] == 21


def test_sync_keeps_what_was_given(run: Run, run_json: Callable[..., Any], world: World, oceans: Path) -> None:
    run("samples", "add", "capitals", oceans, *FIELDS)
    assert run_json("sync", world.adapters["capitals"])["counts"]["unchanged"] == 1
    assert run_json("samples", "list", "capitals")["origins"][0]["count"] == 3


def test_a_bad_file_adds_nothing_and_names_its_lines(run: Run, run_json: Callable[..., Any], oceans: Path) -> None:
    before = run_json("samples", "list", "capitals")
    with oceans.open("a") as stream:
        stream.write("no json\n")
    said = run("samples", "add", "capitals", oceans, *FIELDS, status=1).stderr
    assert "line 4: not JSON" in said
    assert run_json("samples", "list", "capitals") == before


def test_replace_takes_the_place_of_the_same_origin(run: Run, run_json: Callable[..., Any], oceans: Path) -> None:
    run("samples", "add", "capitals", oceans, *FIELDS)
    oceans.write_text('{"question": "Which sea?", "answer": "Black"}\n')
    said = run("samples", "add", "capitals", oceans, *FIELDS, "--replace")
    assert "take the place of 3" in said.stdout
    assert "hub-router index" in said.stderr
    first = run_json("samples", "list", "capitals")["origins"][0]
    assert (first["count"], first["first"]) == (1, [{"input": "Which sea?", "output": "Black"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a FILE or a --dataset"),
        (["mine.jsonl", "--dataset", "a/b"], "name either a FILE or a --dataset"),
        (["mine.jsonl", "--column", "text"], "--column belongs to --dataset"),
        (["--dataset", "a/b", "--column", "c", "--input-field", "x"], "--input-field belongs to a FILE"),
        (["--dataset", "a/b"], "--dataset needs a --column"),
        (["mine.jsonl", "--limit", "5"], "5 is not in the range 20<=x<=1000"),
        (["mine.jsonl", "--split", "train"], "'train' is not one of 'sample', 'test'"),
    ],
)
def test_wrong_usage_is_refused(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("samples", "add", "capitals", *arguments, status=2).stderr


def test_errors_say_what_there_is(run: Run, tmp_path: Path, oceans: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("q,a\nx,y\n")
    said = run("samples", "add", "capitals", "--dataset", table, "--column", "text", status=1).stderr
    assert "its columns are: q, a" in said
    assert "capitals" in run("samples", "add", "capital", oceans, *FIELDS, status=1).stderr
    said = run("samples", "remove", "capitals", "--origin", "samples.jsonl", status=1).stderr
    assert "given are: none" in said


class DatasetHub(LoopbackHub):
    """Serves its repositories as datasets; the Hub's protocol for them differs in the addresses alone."""

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        as_model = re.sub(r"^/datasets/", "/", re.sub(r"^/api/datasets/", "/api/models/", target))
        return super().answer(method, as_model, headers, body)


def test_datasets_of_the_hub(home: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "hub" / "own" / "moods"
    shelf.mkdir(parents=True)
    (shelf / "README.md").write_text(
        "---\nconfigs:\n- config_name: films\n  data_files:\n  - {split: train, path: films/train.csv}\n"
        "  - {split: test, path: films/test.csv}\n- config_name: meals\n  data_files: meals.csv\n---\n"
    )
    for name in ("films/train", "films/test", "meals"):
        file = shelf / f"{name}.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("text,mood\n" + "".join(f"{name} {number},good\n" for number in range(3)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    with DatasetHub(tmp_path / "hub") as server:

        def add(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "hub_router", "samples", "add", "capitals", *arguments]
            return subprocess.run(
                [*command, "--column", "text", "--home", str(home), "--json"],
                env={**environment, "HF_ENDPOINT": server.endpoint},
                capture_output=True,
                text=True,
                check=False,
            )

        done = add("--dataset", "own/moods", "--dataset-config", "films", "--dataset-split", "test")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["origin"] == "dataset own/moods[films]/test: text"
        assert not [request for request in server.requests if "train.csv" in request.path and request.method == "GET"]
        unknown = add("--dataset", "own/moods", "--dataset-config", "books")
        assert "BuilderConfig 'books' not found. Available: ['films', 'meals']" in unknown.stderr
        absent = add("--dataset", "own/none")
        assert "dataset own/none, split train cannot be read: Dataset 'own/none' doesn't exist" in absent.stderr
    assert [(entry.returncode, entry.stdout) for entry in (unknown, absent)] == [(1, "")] * 2
    assert "Traceback" not in unknown.stderr + absent.stderr
    assert not list((tmp_path / "cache" / "datasets").rglob("*.arrow"))
    with Hub(home) as hub:
        assert [sample.input for sample in hub.samples.list("capitals", "sample")][:3] == [
            f"films/test {number}" for number in range(3)
        ]


def test_python_face(home: Path, oceans: Path) -> None:
    with Hub(home) as hub:
        record = hub.show("capitals").record
        done = hub.samples.add(record, oceans, input_field="question", output_field="answer")
        assert (done.adapter, done.added) == (record.ref, 3)
        assert [sample.input for sample in hub.samples.list("capitals", "sample")][:3] == OCEANS
        assert hub.show("capitals").samples[0].given
        assert hub.samples.remove(record, done.origin) == 3
