"""Adapters of other PEFT types, converted to LoRA in the catalog's home and synced from there as local adapters."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hub_router.errors import HubRouterError, UnsupportedAdapterError
from hub_router.lora.conversion_record import ConversionRecord, converted_from, read_record
from hub_router.lora.convertible import config_fields, convertible, foreign_type
from hub_router.progress import Progress
from hub_router.records import UNKNOWN_LICENCE, AdapterDetails, AdapterFacts, AdapterRecord
from hub_router.store import adapters as adapter_queries
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.lora.skeleton import Widths
    from hub_router.store.runs import Outcome
    from hub_router.sync.summary import SyncSummary

FOLDER = "converted"
CARD, SAMPLES = "README.md", {"sample": "samples.jsonl", "test": "test.jsonl"}
_NAME_CHARACTERS = 100
# A run that is killed leaves its unfinished folder; one this old belongs to no run that still works on it.
_LEFT_SECONDS = 86_400.0

Inspect = Callable[[Path], AdapterFacts]
Add = Callable[[tuple[Path, ...]], "SyncSummary"]


def noting(inspect: Inspect, home: Path) -> Inspect:
    """A reader of adapters that adds what ``conversion.json`` says, for the folders that this home holds converted.

    Elsewhere the file is a stranger's claim and is not read.

    Args:
        inspect (Inspect): reads an adapter folder.
        home (Path): home of the catalog.

    Returns:
        Inspect: the same, with one note more for converted adapters.
    """
    own = (home / FOLDER).resolve()

    def read(folder: Path) -> AdapterFacts:
        facts = inspect(folder)
        record = read_record(folder) if folder.resolve().parent == own else None
        return facts if record is None else replace(facts, notes=(record.note, *facts.notes))

    return read


def convertible_refs(store: Store, summary: SyncSummary) -> Sequence[str]:
    """The unsupported adapters of a run that can be converted, by reference.

    Args:
        store (Store): catalog.
        summary (SyncSummary): of the run.

    Returns:
        Sequence[str]: in the summary's order.
    """
    return [record.ref for record in _foreign(store, summary).values() if _is_convertible(record.path)]


def convert_unsupported(
    store: Store, home: Path, summary: SyncSummary, rank: int | float, add: Add, progress: Progress
) -> SyncSummary:
    """Convert the adapters of a run that are of another PEFT type, and sync what comes of it.

    A conversion lies under the home in a folder of the adapter's name and is made anew only where the adapter's files,
    the rank or PEFT's version differ from those that it was made with. It carries the adapter's card and samples.

    Args:
        store (Store): catalog.
        home (Path): home of the catalog.
        summary (SyncSummary): of the run.
        rank (int | float): see :func:`hub_router.lora.convert.convert`.
        add (Add): syncs folders.
        progress (Progress): where to report.

    Returns:
        SyncSummary: with a line for every converted adapter, whose reason says how far it is from the original, and
            the reason why an adapter was not converted behind that of its own line.
    """
    from hub_router.sync.hubrun import reason_of

    began = time.monotonic()
    _clear(home / FOLDER)
    made: dict[str, ConversionRecord] = {}
    reasons: dict[tuple[str, str, str], str] = {}
    for key, record in _foreign(store, summary).items():
        to = (home / FOLDER).resolve() / _folder_name(record)
        try:
            made[str(to)] = _convert(store, record, to, rank, progress)
        except Exception as error:  # noqa: BLE001 - as in sync itself, one bad adapter never stops the run
            reasons[key] = f"not converted: {reason_of(error).removeprefix('unsupported: ')}"
    lines = [replace(line, reason=_joined(line.reason, reasons.get(_key(line), ""))) for line in summary.outcomes]
    if not made:
        return replace(summary, outcomes=tuple(lines), seconds=summary.seconds + time.monotonic() - began)
    synced = add(tuple(Path(folder) for folder in made))
    # A run may name the folder of the converted adapters itself.
    lines = [line for line in lines if line.repo_id not in made]
    for line in synced.outcomes:
        done = made.get(line.repo_id)
        lines.append(line if done is None else replace(line, reason=_joined(done.note, line.reason)))
    return replace(
        summary,
        outcomes=tuple(sorted(lines, key=lambda line: (line.source, line.repo_id, line.subfolder))),
        requests=summary.requests + synced.requests,
        seconds=summary.seconds + time.monotonic() - began,
    )


def answers(line: Outcome, refs: Sequence[str]) -> bool:
    """Whether a line of a run is the conversion of one of these adapters."""
    return any(line.reason.startswith(converted_from(ref)) for ref in refs)


def _foreign(store: Store, summary: SyncSummary) -> dict[tuple[str, str, str], AdapterRecord]:
    """The adapters of a run that are of another PEFT type, with their place in the summary."""
    wanted = [_key(line) for line in summary.outcomes if line.outcome == "unsupported"]
    if not wanted or summary.dry_run:
        return {}
    with store.read() as session:
        known = adapter_queries.list_records(session, statuses=("unsupported",))
    records = {(record.source, record.repo_id, record.subfolder): record for record in known}
    # What was refused before its files were fetched has no folder, and an empty path would be the current one.
    there = {key: records[key] for key in wanted if key in records and records[key].path.is_absolute()}
    return {key: record for key, record in there.items() if foreign_type(record.path)}


def _is_convertible(folder: Path) -> bool:
    try:
        convertible(config_fields(folder) or {})
    except UnsupportedAdapterError:
        return False
    return True


def _convert(store: Store, record: AdapterRecord, to: Path, rank: int | float, progress: Progress) -> ConversionRecord:
    """The conversion of one adapter, made unless the one that is there is current."""
    fields = config_fields(record.path) or {}
    kind = convertible(fields)
    from hub_router.lora.convert import convert, is_current, source_hash

    with store.read() as session:
        texts = _texts(adapter_queries.details(session, record))
    there = read_record(to)
    if there is not None and is_current(to, there, source_hash(record.path), rank):
        _refresh(to, texts)
        return there
    base = _base_widths(fields, record) if kind.needs_shapes else None
    return convert(record.path, to, rank, source=_shown(record), base=base, beside=texts, progress=progress)


def _base_widths(fields: Mapping[str, object], record: AdapterRecord) -> Widths:
    """``(D_out, D_in)`` of every linear module of the adapter's base model, from its config alone."""
    from hub_router.composition.architecture import any_model
    from hub_router.composition.maps import LinearMap, linear_map
    from hub_router.sync.base_model import Statements, resolve

    what = f"{fields.get('peft_type')}, its tensors do not tell the widths of its modules"
    stated = fields.get("base_model_name_or_path")
    stated = stated if isinstance(stated, str) else None
    known = record.base_model_resolved
    # An unsupported adapter's tensors were not compared with anything, so only the user can be certain.
    if record.base_model_confidence != "certain" or known is None:
        known = resolve(Statements(stated, (known,) if known else ()), local=record.source == "local").id
    base = known or stated
    if not base:
        raise UnsupportedAdapterError(f"unsupported: {what}, and it names no base model")
    try:
        model = any_model(base)
    except HubRouterError as error:
        raise UnsupportedAdapterError(f"unsupported: {what}, and {error}") from error
    found = {name: linear_map(module) for name, module in model.named_modules()}
    return {
        name: (each.d_out, each.d_in) for name, each in found.items() if isinstance(each, LinearMap) and not each.lookup
    }


def _texts(details: AdapterDetails) -> dict[str, str]:
    """Card and samples of an adapter as the catalog knows them, as files beside its conversion."""
    record = details.record
    licence = [] if record.licence == UNKNOWN_LICENCE else record.licence.split(", ")
    front = {
        "base_model": record.base_model_resolved,
        "license": licence,
        "tags": list(record.tags),
        "datasets": list(record.datasets),
    }
    stated = {name: value for name, value in front.items() if value}
    head = f"---\n{yaml.safe_dump(stated, sort_keys=False)}---\n" if stated else ""
    texts = {CARD: f"{head}{details.card_text}\n"}
    for split, name in SAMPLES.items():
        rows = [{"input": each.input, "output": each.output} for each in details.samples if each.split == split]
        if rows:
            texts[name] = "".join(json.dumps(row) + "\n" for row in rows)
    return texts


def _refresh(folder: Path, texts: Mapping[str, str]) -> None:
    """Bring card and samples of a conversion up to date; files that stay the same are not touched."""
    for name in (CARD, *SAMPLES.values()):
        path, text = folder / name, texts.get(name, "").encode()
        if name not in texts:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != text:
            new = path.with_name(f".{name}")
            new.write_bytes(text)
            new.replace(path)


def _clear(folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    from hub_router.lora.convert import TEMPORARY

    for left in folder.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):  # another run removed it
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _folder_name(record: AdapterRecord) -> str:
    """The same for every conversion of an adapter, so that a new one takes the place of the old one in the catalog."""
    name = record.ref if record.source == "hub" else Path(record.repo_id).name
    readable = re.sub(r"[^\w.-]+", "--", name, flags=re.ASCII).strip(".-")[-_NAME_CHARACTERS:]
    digest = hashlib.sha256(os.fsencode(f"{record.source} {record.ref}")).hexdigest()
    return f"{readable.strip('.-') or 'adapter'}-{digest[:8]}"


def _shown(record: AdapterRecord) -> str:
    """The reference, on one printable line."""
    return "".join(character if character.isprintable() else "?" for character in record.ref)


def _key(line: Outcome) -> tuple[str, str, str]:
    return line.source, line.repo_id, line.subfolder


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
