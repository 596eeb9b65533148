"""A run that was killed goes on bit for bit; checkpoints are refused that are another run's, or no checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama
from training_models import Watch, distance, same_vectors

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import TrainingError
from hub_router.features import Vectors
from hub_router.prototypes import read_prototypes
from hub_router.training import Example, TrainingSettings, fit

PROGRAM = Path(__file__).with_name("training_run.py")
EVERY = 3
# AdamW, dropout, validation and patience: all that a run remembers.
SETTINGS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 2e-2,
    "weight_decay": 0.01,
    "validation": 0.25,
    "evaluate_every": 2,
    "patience": 2,
    "save_every": EVERY,
}
DROPOUT = {"attention_dropout": 0.2}


def specify(
    folder: Path, name: str, pool: dict[str, Path], examples: Sequence[Example], method: str, **more: Any
) -> tuple[Path, dict[str, Any]]:
    spec = {
        "pool": {key: str(value) for key, value in pool.items()},
        "model": DROPOUT,
        "method": method,
        "examples": [astuple(each) for each in examples],
        "settings": SETTINGS,
        "checkpoint": None,
        "log": str(folder / f"{name}.jsonl"),
        "kill_after": None,
        "options": {},
        "output": str(folder / f"{name}.safetensors"),
        **more,
    }
    (folder / f"{name}.json").write_text(json.dumps(spec))
    return folder / f"{name}.json", spec


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def log_of(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a log, apart from how long they took."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in Path(path).read_text().splitlines()
    ]


def members(path: str | Path) -> Vectors:
    return {member.name: member.vectors for member in read_prototypes(Path(path)).members}


def test_killed_in_the_middle_and_resumed(pool: Any, examples: Any, tmp_path: Path) -> None:
    left, there, here = [], [], []
    # In the second of four phases, and in the only one.
    for method, kill_after in (("phatgoose", 13), ("maple", 5)):
        folder = tmp_path / method
        folder.mkdir()
        shared = {"checkpoint": str(folder / "checkpoint"), "log": str(folder / "resumed.jsonl")}
        killed, _ = specify(folder, "killed", pool, examples, method, kill_after=kill_after, **shared)
        done = run(PROGRAM, killed)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path.name for path in (folder / "checkpoint").iterdir()] == ["training.pt"]
        assert len([line for line in log_of(shared["log"]) if "loss" in line]) == kill_after
        left.append(folder / "checkpoint")
        there.append(specify(folder, "resumed", pool, examples, method, **shared))
        here.append(specify(folder, "whole", pool, examples, method))
    done = run(PROGRAM, *(path for path, _ in (*there, *here)))
    assert done.returncode == 0, done.stderr
    assert not any(folder.exists() for folder in left)
    for (_, resumed), (_, whole) in zip(there, here, strict=True):
        one, other = (Path(spec["output"] + ".0-of-1") for spec in (resumed, whole))
        assert same_vectors(members(one), members(other))
        assert one.read_bytes() == other.read_bytes()
        assert log_of(resumed["log"]) == log_of(whole["log"])


class Runs:
    """Runs over one pool and its data, in this process.

    Args:
        pool (dict[str, Path]): adapters.
        tokenizer (PreTrainedTokenizerBase): of the base model.
        examples (list[Example]): the data.
        folder (Path): for checkpoints and logs.
    """

    def __init__(self, pool: Any, tokenizer: Any, examples: Any, folder: Path) -> None:
        self.pool, self.tokenizer, self.examples = pool, tokenizer, examples
        self.checkpoint, self.log = folder / "checkpoint", folder / "log.jsonl"

    def routed(self, method: str, **options: Any) -> RoutedModel:
        return compose(llama(**DROPOUT), self.pool, method, tokenizer=self.tokenizer, **options)

    def fit(self, routed: RoutedModel, *, stop_at: int | None = None, **more: Any) -> Vectors:
        """The vectors; raises KeyboardInterrupt after ``stop_at`` steps."""
        more = {"examples": self.examples, "settings": SETTINGS, "checkpoint": self.checkpoint, **more}
        data, settings = more.pop("examples"), TrainingSettings(**more.pop("settings"))
        fit(routed, data, settings=settings, log=self.log, progress=Watch(stop_at), **more)
        return routed.vectors

    def stop(self, method: str, stop_at: int, **more: Any) -> RoutedModel:
        routed = self.routed(method)
        with pytest.raises(KeyboardInterrupt):
            self.fit(routed, stop_at=stop_at, **more)
        return routed


@pytest.fixture
def runs(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> Runs:
    return Runs(pool, tokenizer, examples, tmp_path)


@pytest.mark.parametrize("again", ["same model", "new model"])
@pytest.mark.parametrize(
    ("method", "stop_at"),
    [("phatgoose", 2), ("phatgoose", 8), ("phatgoose", 9), ("phatgoose", 20), ("maple", 7), ("lora-mixer", 4)],
)
def test_interrupted_and_resumed_in_one_process(runs: Runs, method: str, stop_at: int, again: str) -> None:
    expected = runs.fit(runs.routed(method), checkpoint=None)
    log = log_of(runs.log)
    routed = runs.stop(method, stop_at)
    assert same_vectors(runs.fit(routed if again == "same model" else runs.routed(method)), expected)
    assert log_of(runs.log) == log
    assert not runs.checkpoint.exists()


def test_interrupted_twice(runs: Runs) -> None:
    expected = runs.fit(runs.routed("maple"), checkpoint=None, settings={**SETTINGS, "steps": 11, "patience": 0})
    for stop_at in (5, 9):
        runs.stop("maple", stop_at, settings={**SETTINGS, "steps": 11, "patience": 0})
    got = runs.fit(runs.routed("maple"), settings={**SETTINGS, "steps": 11, "patience": 0, "save_every": 50})
    assert same_vectors(got, expected)


def test_a_log_that_lost_its_end_or_is_gone(runs: Runs) -> None:
    runs.fit(runs.routed("maple"), checkpoint=None)
    whole = log_of(runs.log)
    runs.stop("maple", 5)
    # As a machine that lost its power leaves it.
    runs.log.write_text(runs.log.read_text() + '{"phase": "maple", "st')
    runs.fit(runs.routed("maple"))
    assert log_of(runs.log) == whole
    runs.stop("maple", 5)
    runs.log.unlink()
    runs.fit(runs.routed("maple"))
    assert log_of(runs.log) == [line for line in whole if line["step"] >= EVERY]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"settings": {**SETTINGS, "seed": 1}}, "seed"),
    "rate": ({"settings": {**SETTINGS, "learning_rate": 1e-2}}, "learning_rate"),
    "option": ({"mask": "none"}, "recipe"),
    "data": ({}, "data"),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_a_checkpoint_of_another_run_is_refused(runs: Runs, kind: str) -> None:
    runs.stop("maple", 5)
    more, said = OTHERS[kind]
    routed = runs.routed("maple")
    vectors, kept = routed.vectors, (runs.checkpoint / "training.pt").read_bytes()
    with pytest.raises(TrainingError) as raised:
        runs.fit(routed, **more, examples=runs.examples[: -1 if kind == "data" else None])
    message = str(raised.value)
    assert "is a checkpoint of another run:" in message
    assert [line.split(":")[0] for line in message.splitlines() if line.startswith("  - ")] == [f"  - {said}"]
    assert message.endswith("run that one to its end, or begin anew: --restart, or another folder")
    assert same_vectors(routed.vectors, vectors)
    assert (runs.checkpoint / "training.pt").read_bytes() == kept


def test_another_method_pool_or_start_is_refused(runs: Runs) -> None:
    runs.stop("maple", 5)
    routed = runs.routed("maple", top_k=2)
    with pytest.raises(TrainingError, match=r"another run:\n  - top_k"):
        runs.fit(routed)
    with pytest.raises(TrainingError, match=r"  - method: 'maple', now 'lora-mixer'"):
        runs.fit(runs.routed("lora-mixer"))
    swapped = {**runs.pool, "mlp": runs.pool["all"], "all": runs.pool["mlp"]}
    started = runs.routed("maple")
    with torch.no_grad():
        started.model.model.layers[0].self_attn.q_proj.hub_router_update.router_P.add_(1.0)
    with pytest.raises(TrainingError, match=r"another run:\n  - start"):
        runs.fit(started)
    runs.pool = swapped
    with pytest.raises(TrainingError, match=r"  - adapters"):
        runs.fit(runs.routed("maple"))


@pytest.mark.parametrize("method", ["maple", "lora-mixer"])
def test_another_order_of_the_pool_is_refused_or_followed(runs: Runs, method: str) -> None:
    # A checkpoint's vectors are rows in the pool's order.
    expected = runs.fit(runs.routed(method), checkpoint=None)
    runs.stop(method, 5)
    runs.pool = dict(reversed(runs.pool.items()))
    try:
        got = runs.fit(runs.routed(method))
    except TrainingError as error:
        assert "adapters" in str(error)
    else:
        assert distance(got, expected) <= 1e-4


def test_how_often_a_checkpoint_is_written_does_not_matter(runs: Runs) -> None:
    expected = runs.fit(runs.routed("maple"), checkpoint=None)
    runs.stop("maple", 5)
    assert same_vectors(runs.fit(runs.routed("maple"), settings={**SETTINGS, "save_every": 1}), expected)


def flip(data: bytes, place: float) -> bytes:
    at = int(len(data) * place)
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


DAMAGE: dict[str, Any] = {
    "empty": lambda data: b"",
    "no archive": lambda data: b"not a checkpoint",
    "cut short": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-100],
    "a changed header": lambda data: flip(data, 0.0),
    **{f"a changed bit at {place}": lambda data, place=place: flip(data, place) for place in (0.2, 0.4, 0.6, 0.8)},
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_checkpoint_is_refused(runs: Runs, kind: str) -> None:
    runs.stop("maple", 5)
    path = runs.checkpoint / "training.pt"
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    routed = runs.routed("maple")
    vectors = routed.vectors
    with pytest.raises(
        TrainingError, match=r"(?s)training.pt cannot be read as a checkpoint.*; remove it to start anew"
    ) as e:
        runs.fit(routed)
    # PyTorch's own advice, to load the file without that check, is none to pass on.
    assert "weights_only" not in str(e.value)
    assert same_vectors(routed.vectors, vectors)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [{"weights": torch.zeros(3)}, {"format": "another", "fingerprint": "{}"}, Evil()])
def test_a_file_that_is_no_checkpoint_is_refused(runs: Runs, content: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runs.checkpoint.mkdir()
    torch.save(content, runs.checkpoint / "training.pt")
    with pytest.raises(TrainingError, match=r"training.pt (cannot be read as a checkpoint|is no hub-router training)"):
        runs.fit(runs.routed("maple"))
    assert not (tmp_path / "pwned").exists()
    assert (runs.checkpoint / "training.pt").exists()


def test_the_folder_keeps_what_is_not_the_runs_own(runs: Runs) -> None:
    runs.checkpoint.mkdir()
    (runs.checkpoint / "notes.txt").write_text("mine")
    runs.fit(runs.routed("maple"))
    assert [path.name for path in runs.checkpoint.iterdir()] == ["notes.txt"]


def test_what_a_killed_writer_left_is_cleared(runs: Runs) -> None:
    runs.stop("maple", 5)
    (runs.checkpoint / ".training.pt.4194303").write_bytes(b"half")
    runs.fit(runs.routed("maple"))
    assert not runs.checkpoint.exists()


def test_two_processes_give_what_one_gives(pool: Any, examples: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 4, "learning_rate": 1e-3, "patience": 0}
    # The last with fewer examples in a step than processes.
    kinds = {
        "maple": ("maple", {}, settings),
        "mixer": ("lora-mixer", {"balance": "none"}, settings),
        "few": ("maple", {}, {"steps": 2, "batch_size": 1, "learning_rate": 1e-3}),
    }
    specs = {
        name: specify(
            tmp_path, name, pool, examples, method, options=options, settings=chosen, model={},
            checkpoint=str(tmp_path / "checkpoint"),
        )
        for name, (method, options, chosen) in kinds.items()
    }  # fmt: skip
    distributed = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(*distributed, PROGRAM, *(path for path, _ in specs.values()))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "checkpoint").exists()
    for name, (method, options, chosen) in kinds.items():
        first, second = (members(f"{specs[name][1]['output']}.{rank}-of-2") for rank in range(2))
        assert same_vectors(first, second)
        routed = compose(llama(), pool, method, tokenizer=tokenizer)
        fit(routed, examples, settings=TrainingSettings(**chosen), log=tmp_path / "one.jsonl", **options)
        assert distance(first, routed.vectors) <= 1e-5
        two, one = log_of(specs[name][1]["log"]), log_of(tmp_path / "one.jsonl")
        assert [line.keys() for line in two] == [line.keys() for line in one]
        for line, other in zip(two, one, strict=True):
            # The entropy is that of the first process's share.
            for key in line.keys() - {"phase", "entropy"}:
                assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
