"""Examples of adapters' tasks: those that sync found, and those that the user gave.

Both are stored whole, so that removing what was given brings back what it stood in front of. Rows of one split are
numbered from 0, given ones first; reading shows each input once and the given ones before the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from hub_router.errors import SamplesError
from hub_router.records import SAMPLES_PER_SPLIT, Sample
from hub_router.store.tables import Adapter, AdapterSample

# Origin of a card's examples, and what that of a manifest's begins with.
WIDGET_ORIGIN = "card widget"
MANIFEST_ORIGIN = "manifest "


@dataclass(frozen=True)
class Addition:
    """What became of samples that a user gave.

    Args:
        added (int): samples that are new.
        known (int): samples left out because the user gave one with the same input before.
        replaced (int): samples of the same origin that they took the place of.
    """

    added: int
    known: int
    replaced: int


def choose(samples: Iterable[Sample], limit: int) -> tuple[list[Sample], int]:
    """A choice of samples of one split that depends on nothing but their inputs; each input counts once, the first.

    Up to ``limit`` samples are all kept, in their order. Of more, those are kept whose inputs have the smallest
    sha256, in the order of the digests: every prefix of the choice is then spread evenly over the whole source, however
    the source is sorted, and one row more or less in it changes at most one that is kept.

    Args:
        samples (Iterable[Sample]): any number, read once.
        limit (int): at most this many are kept.

    Returns:
        tuple[list[Sample], int]: the choice, and how many samples are left out for the limit.
    """
    kept: dict[int, Sample] = {}
    largest: list[int] = []  # a heap of the negated digests of those kept
    left_out = 0
    for sample in samples:
        digest = int.from_bytes(hashlib.sha256(sample.input.encode()).digest())
        if digest in kept:
            continue
        if len(kept) < limit:
            heappush(largest, -digest)
        else:
            left_out += 1
            if not kept or digest > -largest[0]:
                continue
            del kept[-heapreplace(largest, -digest)]
        kept[digest] = sample
    return [kept[digest] for digest in (sorted(kept) if left_out else kept)], left_out


def merge_samples(sources: Sequence[Iterable[Sample]]) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """One set of samples from several sources, each input of a split once.

    Args:
        sources (Sequence[Iterable[Sample]]): the one that comes first wins a repeated input, and fills the split.

    Returns:
        tuple[tuple[Sample, ...], tuple[str, ...]]: at most ``SAMPLES_PER_SPLIT`` per split, and a note for each source
            of which something was left out because earlier ones filled the split.
    """
    kept: dict[str, dict[str, Sample]] = {}
    notes: list[str] = []
    for source in sources:
        fresh: dict[str, list[Sample]] = {}
        for sample in source:
            if sample.input not in kept.get(sample.split, {}):
                fresh.setdefault(sample.split, []).append(sample)
        for split, own in fresh.items():
            held = kept.setdefault(split, {})
            chosen, left_out = choose(own, SAMPLES_PER_SPLIT - len(held))
            held |= {sample.input: sample for sample in chosen}
            if left_out:
                notes.append(f"{own[0].origin}: {left_out} samples left out, at most {SAMPLES_PER_SPLIT} are kept")
    return tuple(sample for held in kept.values() for sample in held.values()), tuple(notes)


def samples(session: Session, adapter_id: int, split: str | None = None) -> list[Sample]:
    """Stored examples of an adapter's task: given ones first, each input once, at most ``SAMPLES_PER_SPLIT`` per split.

    Args:
        session (Session): a session of the store.
        adapter_id (int): catalog id.
        split (str | None): ``sample`` or ``test``; default both.

    Returns:
        list[Sample]: empty where the adapter came without any.
    """
    rows = [row for row in _rows(session, adapter_id) if split in (None, row.split)]
    shown: list[Sample] = []
    for name in dict.fromkeys(row.split for row in rows):
        given = [row for row in rows if row.split == name and row.given]
        inputs = {row.input for row in given}
        found = (row for row in rows if row.split == name and row.input not in inputs)
        shown += [*given, *choose(found, SAMPLES_PER_SPLIT - len(given))[0]]
    return shown


def add_given(session: Session, adapter_id: int, new: Sequence[Sample], *, replace_origin: bool = False) -> Addition:
    """Add samples that a user gives; all or none.

    Args:
        session (Session): a writing session.
        adapter_id (int): catalog id.
        new (Sequence[Sample]): of one split and one origin, each input once.
        replace_origin (bool): put them in place of the given samples of their split and origin.

    Returns:
        Addition: what became of them.

    Raises:
        SamplesError: the split would have more than ``SAMPLES_PER_SPLIT`` given samples.
    """
    rows = _rows(session, adapter_id)
    kinds = {(sample.split, sample.origin) for sample in new}
    given = [row for row in rows if row.given]
    kept = [row for row in given if not (replace_origin and (row.split, row.origin) in kinds)]
    known = {(row.split, row.input) for row in kept}
    fresh = [replace(sample, given=True) for sample in new if (sample.split, sample.input) not in known]
    for split in dict.fromkeys(sample.split for sample in fresh):
        count = sum(row.split == split for row in (*kept, *fresh))
        if count > SAMPLES_PER_SPLIT:
            raise SamplesError(
                f"the adapter would have {count} given samples in split {split!r}, at most {SAMPLES_PER_SPLIT} are "
                "kept; remove some with: hub-router samples remove ADAPTER --origin ORIGIN, or give fewer with --limit"
            )
    _rewrite(session, adapter_id, [*kept, *fresh], [row for row in rows if not row.given])
    return Addition(len(fresh), len(new) - len(fresh), len(given) - len(kept))


def remove_given(session: Session, adapter_id: int, origin: str) -> int:
    """Forget the samples of one origin that a user gave.

    Args:
        session (Session): a writing session.
        adapter_id (int): catalog id.
        origin (str): as stored.

    Returns:
        int: how many there were.

    Raises:
        SamplesError: the user gave none of that origin; names the origins that there are.
    """
    rows = _rows(session, adapter_id)
    kept = [row for row in rows if not (row.given and row.origin == origin)]
    if len(kept) == len(rows):
        origins = ", ".join(repr(name) for name in dict.fromkeys(row.origin for row in rows if row.given))
        raise SamplesError(
            f"no sample of origin {origin!r} was given, so there is none to remove; given are: {origins or 'none'}"
        )
    _rewrite(session, adapter_id, [row for row in kept if row.given], [row for row in kept if not row.given])
    return len(rows) - len(kept)


def write_found(session: Session, adapter_id: int, found: Sequence[Sample]) -> None:
    """Put what sync found in place of what it found before; given samples stay.

    Args:
        session (Session): a writing session.
        adapter_id (int): catalog id.
        found (Sequence[Sample]): both splits.
    """
    _rewrite(session, adapter_id, [row for row in _rows(session, adapter_id) if row.given], found)


def write_stated(session: Session, repo_pk: int, stated: Mapping[str, Sequence[Sample]]) -> None:
    """Put what a manifest states about adapters whose files did not change in place of what one stated before.

    Args:
        session (Session): a writing session.
        repo_pk (int): key of the repository's row.
        stated (Mapping[str, Sequence[Sample]]): by folder of the adapter.
    """
    current = select(Adapter.id, Adapter.subfolder).where(Adapter.repo_pk == repo_pk, Adapter.current)
    for adapter_id, subfolder in session.execute(current).all():
        if subfolder not in stated:
            continue
        rows = _rows(session, adapter_id)
        found = [row for row in rows if not row.given]
        own = [row for row in found if not row.origin.startswith((MANIFEST_ORIGIN, WIDGET_ORIGIN))]
        widget = [row for row in found if row.origin == WIDGET_ORIGIN]
        merged, _ = merge_samples([own, stated[subfolder], widget])
        if merged != tuple(found):
            _rewrite(session, adapter_id, [row for row in rows if row.given], merged)


def hand_over(session: Session, source_id: int, target_id: int, *, join: bool = False) -> None:
    """Let an adapter's new row have the samples that the user gave to its old one.

    Args:
        session (Session): a writing session.
        source_id (int): catalog id of the old row, which keeps its own.
        target_id (int): catalog id of the new row.
        join (bool): beside those that the new row was given itself, which come first; default in their place.
    """
    rows = _rows(session, target_id)
    given = [row for row in rows if row.given and join]
    given += [row for row in _rows(session, source_id) if row.given]
    chosen = [
        sample
        for split in dict.fromkeys(row.split for row in given)
        for sample in choose((row for row in given if row.split == split), SAMPLES_PER_SPLIT)[0]
    ]
    _rewrite(session, target_id, chosen, [row for row in rows if not row.given])


def _rows(session: Session, adapter_id: int) -> list[Sample]:
    """All stored samples of an adapter, in order."""
    row = AdapterSample
    statement = select(row.input, row.output, row.split, row.origin, row.given).where(row.adapter_id == adapter_id)
    return [Sample(*columns) for columns in session.execute(statement.order_by(row.split, row.position))]


def _rewrite(session: Session, adapter_id: int, given: Sequence[Sample], found: Sequence[Sample]) -> None:
    """Replace all samples of an adapter; positions count within each split."""
    session.execute(delete(AdapterSample).where(AdapterSample.adapter_id == adapter_id))
    numbers: dict[str, int] = {}
    rows: list[dict[str, object]] = []
    for sample in (*given, *found):
        position = numbers.get(sample.split, 0)
        numbers[sample.split] = position + 1
        rows.append({"adapter_id": adapter_id, "position": position, **vars(sample)})
    if rows:
        session.execute(insert(AdapterSample), rows)
