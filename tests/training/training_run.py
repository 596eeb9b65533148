"""Training runs in a process of their own: ``python training_run.py SPEC.json ...``; one may kill the process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "composition"))

from accelerate import PartialState
from compose_models import llama, make_tokenizer

from hub_router.composition.build import compose
from hub_router.progress import Advance
from hub_router.prototypes import write_prototypes
from hub_router.training import Example, TrainingSettings, fit


class Killed:
    """Progress that ends its process with SIGKILL after some steps."""

    def __init__(self, after: int | None) -> None:
        self._left = after

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        def advance(steps: int, note: str = "") -> None:
            if self._left is not None:
                self._left -= steps
                if self._left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        yield advance


def main(path: Path) -> None:
    spec = json.loads(path.read_text())
    pool = {name: Path(folder) for name, folder in spec["pool"].items()}
    routed = compose(llama(**spec["model"]), pool, spec["method"], tokenizer=make_tokenizer())
    result = fit(
        routed,
        [Example(*each) for each in spec["examples"]],
        settings=TrainingSettings(**spec["settings"]),
        checkpoint=spec["checkpoint"],
        log=spec["log"],
        progress=Killed(spec["kill_after"]),
        **spec["options"],
    )
    state = PartialState()
    write_prototypes(Path(f"{spec['output']}.{state.process_index}-of-{state.num_processes}"), result.prototypes)


for argument in sys.argv[1:]:
    main(Path(argument))
