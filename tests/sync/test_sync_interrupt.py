"""Runs that are killed, interrupted or doubled: real processes on one catalog and one cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import select
from sync_world import Bench, outcomes

import hub_router
from hub_router.demo.hubfaults import Fault
from hub_router.store.tables import SyncOutcome, SyncRun

RUN = """
import hashlib
import sys
from pathlib import Path
from hub_router.records import AdapterFacts, ModuleFacts
from hub_router.store.session import open_store
from hub_router.sync.run import ClientOptions, SyncRequest, sync
database, endpoint, cache = sys.argv[1:]
def inspect(path):
    # The real one loads torch, which takes longer than all the rest of this process.
    data = (path / "adapter_model.safetensors").read_bytes()
    module = ModuleFacts("model.layers.0.self_attn.q_proj", 2, 8, 8, 2.0)
    return AdapterFacts("LORA", "owner/base", (module,), ("float32",), 32, len(data), hashlib.sha256(data).hexdigest())
options = ClientOptions(endpoint=endpoint, cache_dir=Path(cache), timeout=20, retries=1, backoff=0.01)
with open_store(database) as store:
    print("ready", flush=True)
    print(sync(store, SyncRequest(author="ann", workers=4), inspect, options=options).counts, flush=True)
"""


def start(bench: Bench) -> subprocess.Popen[str]:
    """A sync of ann's repositories in a process of its own, past its imports."""
    root = str(Path(hub_router.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, bench.store.url, bench.hub.endpoint, str(bench.folder / "cache")],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for(bench: Bench, count: int) -> None:
    """Waits until so many adapters are in the catalog."""
    deadline = time.monotonic() + 60
    while len(bench.rows()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_half_file(bench: Bench) -> None:
    deadline = time.monotonic() + 60
    # os.walk passes over folders that the run removes in between.
    while not any(name.endswith(".incomplete") for _, _, names in os.walk(bench.folder / "cache") for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_keeps_what_is_done_and_the_next_one_does_the_rest(bench: Bench, stop: signal.Signals) -> None:
    for number in range(6):
        bench.repo(f"ann/task{number}", seed=number)
    # Four adapters pass, two stall in the middle of their weights.
    stalling = [f"/ann/task{number}/resolve/.*/adapter_model" for number in (1, 4)]
    for path in stalling:
        bench.hub.faults.add(Fault(path, method="GET", stall=60))
    process = start(bench)
    try:
        wait_for_half_file(bench)
        wait_for(bench, 1)
        began = time.monotonic()
        process.send_signal(stop)
        process.wait(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    done = bench.rows()
    assert set(done.values()) == {("ready", "")}
    assert 0 < len(done) < 6
    with bench.store.read() as session:
        assert session.scalars(select(SyncRun)).one().finished_at is None
        recorded = set(session.scalars(select(SyncOutcome.repo_id).where(SyncOutcome.outcome == "added")))
        assert recorded == set(done)

    bench.hub.faults.clear()
    bench.asked()
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {
        f"ann/task{number}": "unchanged" if f"ann/task{number}" in done else "added" for number in range(6)
    }
    fetched = "\n".join(entry for entry in bench.asked() if "/resolve/" in entry)
    assert not any(f"{name}/resolve" in fetched for name in done)
    assert list((bench.folder / "cache").rglob("*.incomplete")) == []
    assert set(bench.rows().values()) == {("ready", "")}


def test_two_runs_at_once_agree(bench: Bench) -> None:
    for number in range(12):
        bench.repo(f"ann/task{number}", seed=number)
    runs = [start(bench) for _ in range(2)]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert len(bench.rows()) == 12
    assert set(bench.rows().values()) == {("ready", "")}
    with bench.store.read() as session:
        finished = [run.finished_at for run in session.scalars(select(SyncRun))]
        per_run = list(session.scalars(select(SyncOutcome.outcome)))
    assert len(finished) == 2
    assert all(finished)
    assert len(per_run) == 24
    assert set(per_run) <= {"added", "updated", "unchanged"}
    assert set(outcomes(bench.sync(author="ann")).values()) == {"unchanged"}


def test_half_files_of_a_running_download_are_spared(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault("/resolve/.*/adapter_model", method="GET", stall=2, times=1))
    process = start(bench)
    wait_for_half_file(bench)
    # A second run on the same repository meets the first one's lock and must not pull the file from under it.
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "'failed': 0" in out
    assert bench.rows() == {"ann/one": ("ready", "")}
