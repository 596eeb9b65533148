"""What a sync did: one outcome per adapter (or per repository that gave none), and the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from hub_router.store.runs import Outcome

OUTCOMES = ("added", "updated", "unchanged", "unsupported", "gated", "missing", "failed")


@dataclass(frozen=True)
class SyncSummary:
    """The result of one call of ``sync``.

    Args:
        outcomes (tuple[Outcome, ...]): what became of every adapter, by name; a repository without adapters has one.
        run_id (int | None): the run's record in the catalog; None for a dry run.
        dry_run (bool): the outcomes say what would be done.
        requests (int): HTTP requests sent to the Hub.
        seconds (float): duration.
    """

    outcomes: tuple[Outcome, ...]
    run_id: int | None
    dry_run: bool
    requests: int
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of outcomes of each kind, in the order of :data:`OUTCOMES`, zeros included."""
        found = Counter(outcome.outcome for outcome in self.outcomes)
        return {name: found[name] for name in OUTCOMES}

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for could be looked at."""
        return not self.counts["failed"]

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "run_id": self.run_id,
            "dry_run": self.dry_run,
            "counts": self.counts,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
        }
