"""The main job on the bundled zoo: sync, index, search, compose, generate, report, eval, as a user would type it.

The zoo is served over HTTP on loopback in the Hub's own protocol, and the real huggingface_hub client fetches it. Every
step runs the command line that is shown, so it can be repeated on any other adapters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hub_router.demo.hubserver import LoopbackHub
from hub_router.errors import SettingsError
from hub_router.settings import bundled

BASE = "hub_router/zoo-base"
QUESTION = "is this review positive?"
METHODS = "base,own,uniform,arrow,spectr"
# All methods are scored on every seventh task: leaving a task's own adapter out takes a composition per method.
EVERY = 7


def commands(prompt: str, pool: list[str], epsilon: Callable[[], float]) -> Iterator[tuple[str, list[str]]]:
    """The steps: what each shows, and its command line.

    Args:
        prompt (str): prompt for the ``generate`` step.
        pool (list[str]): every adapter of the zoo.
        epsilon (Callable[[], float]): what ``report`` found; asked after that step.

    Returns:
        Iterator[tuple[str, list[str]]]: (title, arguments of ``hub-router``).
    """
    yield from [
        ("Fetch every adapter the Hub lists for the base model", ["sync", "--base-model", BASE]),
        ("Compute spectra, text embeddings and the search index", ["index", "--encoder", "offline"]),
        ("Find adapters by task", ["search", QUESTION, "--limit", "5"]),
        (
            "Compose the best four with Arrow",
            ["compose", "reviews", "--query", QUESTION, "--limit", "4", "--method", "arrow"],
        ),
        ("Generate, and see which adapter won each token", ["generate", "reviews", prompt, "--explain"]),
        ("Compose the whole zoo", ["compose", "zoo", *pool, "--method", "arrow"]),
        ("Calibrate HiLoRA for it, and see how well its tasks can be told apart", ["report", "zoo", "--pool"]),
    ]
    hilora = f"hilora:epsilon={epsilon():g}"
    yield (
        "Score it task by task, on 16 held-out prompts each",
        ["eval", "zoo", "--methods", f"{METHODS},{hilora}", "--samples", "16"],
    )
    tasks = pool[::EVERY]
    yield (
        f"Score all methods on {len(tasks)} of the tasks, their own adapters in the pool and left out",
        ["eval", "zoo", "--methods", f"all,{hilora}", "--unseen", "--tasks", ",".join(tasks)],
    )


def run(invoke: Callable[[list[str]], int], say: Callable[[str], None], keep: Path | None = None) -> int:
    """Run the demo.

    Args:
        invoke (Callable[[list[str]], int]): runs a command line in this process; its exit status.
        say (Callable[[str], None]): prints a line for the user.
        keep (Path | None): folder for the demo's home and downloads, kept afterwards; default a temporary one.

    Returns:
        int: 0, or the exit status of the first step that failed.

    Raises:
        SettingsError: huggingface_hub was imported before the demo could point it at loopback.
    """
    if "huggingface_hub" in sys.modules:
        raise SettingsError("huggingface_hub is already loaded in this process; run the demo as: hub-router demo")
    zoo = bundled("zoo")
    with _folder(keep) as folder, LoopbackHub(zoo) as hub:
        os.environ.update(
            HF_ENDPOINT=hub.endpoint,
            HF_HOME=str(folder / "huggingface"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HUB_ROUTER_HOME=str(folder / "home"),
        )
        # The zoo's models are so small that threads wait for each other longer than they work.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUB_ROUTER_DATABASE_URL"):
            os.environ.pop(name, None)
        os.environ["NO_PROXY"] = "127.0.0.1"
        say(f"The bundled zoo is served as a Hub at {hub.endpoint}; the catalog of this demo lives in {folder}.")
        status = _steps(invoke, say, zoo)
        if keep is not None:
            # The catalog's adapters lie in the demo's own download cache.
            homes = f"HF_HOME={shlex.quote(os.environ['HF_HOME'])} HF_HUB_OFFLINE=1"
            say(f"Kept. Go on with: {homes} hub-router --home {shlex.quote(str(folder / 'home'))} compositions")
        return status


def _steps(invoke: Callable[[list[str]], int], say: Callable[[str], None], zoo: Path) -> int:
    """Run the steps in order until one fails."""
    began = time.monotonic()
    pool = sorted(path.name for path in (zoo / "hub_router").glob("zoo-*") if path.name != "zoo-base")
    for title, arguments in commands(_prompt(zoo), pool, _epsilon):
        say(f"\n# {title}\n$ hub-router {shlex.join(arguments)}")
        started = time.monotonic()
        status = invoke(arguments)
        say(f"({time.monotonic() - started:.1f} s)")
        if status:
            return status
    say(f"\nDone in {time.monotonic() - began:.0f} s. On your own adapters: the same commands, without the demo's Hub.")
    return 0


def _epsilon() -> float:
    """The epsilon of HiLoRA that the report on the whole zoo chose."""
    from hub_router.hub import Hub

    with Hub() as hub:
        return hub.report_pool("zoo").calibration.chosen.epsilon


def _prompt(zoo: Path) -> str:
    """A held-out prompt of a review task."""
    path = next(iter(sorted((zoo / "hub_router").glob("zoo-film/test.jsonl"))))
    with path.open() as lines:
        return str(json.loads(next(lines))["input"])


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The demo's folder: the user's, or one that is removed at the end."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="hub-router-demo-") as folder:
        yield Path(folder)
