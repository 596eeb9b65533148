"""Reproduce in small what the papers claim, on the zoo, and print the tables in Markdown.

python examples/reproduce/run.py [maple] [lora-mixer] [ewora] [training-free]
        [--seeds 0 1 2] [--workers 2] [--out results.json] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import ewora
import lora_mixer
import maple
import training_free
import zoo

EXPERIMENTS = {"maple": maple, "lora-mixer": lora_mixer, "ewora": ewora, "training-free": training_free}


def main() -> None:
    """Run the experiments that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file for the raw results")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps adapters trained for maple; default: a temporary one"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["REPRODUCE_WORK"] = str((arguments.work or Path(temporary)).absolute())
        collected = {name: _run(name, arguments) for name in arguments.experiments or EXPERIMENTS}
    print(f"{time.monotonic() - began:.0f} s in all")
    if arguments.out:
        arguments.out.write_text(json.dumps(collected, indent=1), encoding="utf-8")


def _run(name: str, arguments: argparse.Namespace) -> list[object]:
    began, experiment = time.monotonic(), EXPERIMENTS[name]
    if experiment is maple:
        maple.prepare(arguments.workers)
    results = zoo.in_processes(experiment.run, experiment.jobs(arguments.seeds), arguments.workers, name)
    report = experiment.report(results, arguments.seeds)
    print(f"## {name} ({time.monotonic() - began:.0f} s)\n\n{report}\n", flush=True)
    return results


if __name__ == "__main__":
    main()
