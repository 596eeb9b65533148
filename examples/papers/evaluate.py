"""Score methods that need no training over a collection, as a config of examples/papers/evaluation says.

python examples/papers/evaluate.py CONFIG [--dry-run] [--out results.json] [--home DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_router import Hub
from hub_router.errors import HubRouterError
from hub_router.evaluate.columns import OWN, read_columns
from hub_router.hub.trainingpool import collection_pool
from hub_router.routing.registry import create

# Key -> what it must be, and whether it must be there.
KEYS: Mapping[str, tuple[type, bool]] = {
    "name": (str, True),
    "base": (str, True),
    "collection": (str, True),
    "adapters": (list, False),
    "method": (str, True),
    "methods": (list, True),
    "tasks": (list, False),
    "samples": (int, False),
    "unseen": (bool, False),
    "set": (dict, False),
}


def main() -> int:
    """Define the composition, and score it unless that is all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="check everything but the weights; score nothing")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--home", type=Path, help="folder of the catalog")
    arguments = parser.parse_args()
    try:
        entry = read_config(arguments.config)
        for column in read_columns(entry["methods"], {entry["method"]: entry.get("set", {})}):
            if column.method != OWN:
                create(column.method, column.hyperparameters)
        with Hub(arguments.home) as hub:
            pool = collection_pool(hub.store, entry["collection"])
            wanted = entry.get("adapters")
            if wanted and (absent := set(wanted) - {record.name for record in pool}):
                raise HubRouterError(f"{arguments.config}: collection has no adapters {', '.join(sorted(absent))}")
            members = [record for record in pool if not wanted or record.name in wanted]
            composition = hub.define(
                entry["name"], members, entry["method"], base_model=entry["base"], replace=True, **entry.get("set", {})
            )
            print(f"Stored {entry['name']}: {len(composition.members)} adapters on {composition.base_model}.")
            if arguments.dry_run:
                return 0
            table = hub.evaluate(
                entry["name"],
                entry["methods"],
                tasks=entry.get("tasks"),
                samples=entry.get("samples"),
                unseen=entry.get("unseen", False),
            )
    except HubRouterError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.write_text(json.dumps(dataclasses.asdict(table), indent=1, default=str), encoding="utf-8")
    print("| method | seen | unseen |\n|---|---|---|")
    for method in table.methods:
        scores = (means.get(method) for means in (table.mean, table.unseen_mean))
        print(f"| {method} | {' | '.join('-' if score is None else f'{score:.3f}' for score in scores)} |")
    for method, reason in table.refused.items():
        print(f"{method}: {reason}")
    return 0


def read_config(path: Path) -> dict[str, Any]:
    """A config whose keys and values are what they must be; all that are not are named."""
    entry = tomllib.loads(path.read_text(encoding="utf-8"))
    faults = [f"{key} is no key" for key in entry if key not in KEYS]
    faults += [f"{key} is missing" for key, (_, needed) in KEYS.items() if needed and key not in entry]
    faults += [
        f"{key} is {value!r}, expected a {KEYS[key][0].__name__}"
        for key, value in entry.items()
        if key in KEYS and not isinstance(value, KEYS[key][0])
    ]
    if faults:
        raise HubRouterError(f"{path}: {'; '.join(faults)}; keys: {', '.join(KEYS)}")
    return entry


if __name__ == "__main__":
    sys.exit(main())
