"""Reproduce in small what the papers claim, on the zoo, and print the tables in Markdown.

python examples/reproduce/run.py [maple] [lora-mixer] [ewora] [training-free]
        [--seeds 0 1 2] [--workers 2] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import os
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
    arguments = parser.parse_args()
    collected = {}
    for name in arguments.experiments or EXPERIMENTS:
        began = time.monotonic()
        experiment = EXPERIMENTS[name]
        results = zoo.in_processes(experiment.run, experiment.jobs(arguments.seeds), arguments.workers, name)
        collected[name] = results
        print(
            f"## {name} ({time.monotonic() - began:.0f} s)\n\n{experiment.report(results, arguments.seeds)}\n",
            flush=True,
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(collected, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
