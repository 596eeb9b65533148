"""From an adapter's files on this machine to what the catalog stores about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hub_router.errors import UnsupportedAdapterError
from hub_router.records import AdapterFacts, Sample
from hub_router.store.repos import AdapterFields, FileFields
from hub_router.store.samples import merge_samples
from hub_router.sync.base_model import Fits, Statements, resolve
from hub_router.sync.card import CARD_BYTES, Card, merge_cards, parse_card, with_hub
from hub_router.sync.discover import CARD, AdapterFolder
from hub_router.sync.download import HashedFile
from hub_router.sync.samples import read_samples
from hub_router.sync.statement import Stated, read_statement
from hub_router.sync.text import is_storable, plain, storable

# Faults of one adapter, by module, that the catalog keeps, and characters of each and of any other line.
MAX_FAULTS = 1_000
LINE_CHARACTERS = 2_000

Inspect = Callable[[Path], AdapterFacts]


def describe(
    path: Path,
    folder: AdapterFolder,
    files: Sequence[HashedFile],
    inspect: Inspect,
    *,
    task: str = "",
    base_model: str | None = None,
    hub: Card | None = None,
    samples: tuple[Sample, ...] = (),
    fits: Fits | None = None,
) -> AdapterFields:
    """Read config, weights' headers, cards and samples of one adapter.

    Args:
        path (Path): the adapter's folder.
        folder (AdapterFolder): its place in the tree, and notes about files left out.
        files (Sequence[HashedFile]): its files, verified; cards from the nearest to the top.
        inspect (Inspect): reads config and tensors; raises UnsupportedAdapterError.
        task (str): task that a manifest states, put before the card's text.
        base_model (str | None): base model that a manifest states, for adapters that name none themselves.
        hub (Card | None): licence and tags that the Hub states; None for an adapter of this machine.
        samples (tuple[Sample, ...]): examples that a manifest states; those of the adapter's own files come first.
        fits (Fits | None): compares the adapter with a base model whose config is on this machine.

    Returns:
        AdapterFields: with ``reason`` instead of facts where the adapter cannot be used.
    """
    depth = len(folder.subfolder.split("/")) if folder.subfolder else 0
    top = path.parents[depth - 1] if depth else path
    card = read_cards(top, [file.path for file in files])
    card = with_hub(card, hub) if hub else card
    own = f"{folder.subfolder}/{CARD}" if folder.subfolder else CARD
    # A card further up describes all adapters below it, and its examples may be of any of their tasks.
    widget = card.widget if any(file.path == own for file in files) else ()
    found, notes = read_samples(path)
    merged, cut = merge_samples([found, samples, widget])
    reason, facts = "", None
    faults: tuple[str, ...] = ()
    try:
        facts = _storable_facts(inspect(path))
    except UnsupportedAdapterError as error:
        # The status says that much already.
        reason = _line(str(error).removeprefix("unsupported: "))
        faults = tuple(_line(fault) for fault in error.faults[:MAX_FAULTS])
    stated = Stated() if facts else read_statement(path)
    said = Statements(facts.base_model if facts else stated.base_model, card.base_models, card.base_tags, base_model)
    return AdapterFields(
        subfolder=folder.subfolder,
        path=str(path),
        facts=facts,
        reason=reason,
        stated_type=stated.peft_type,
        stated_base=stated.base_model,
        base_model=resolve(said, facts, fits, local=hub is None),
        base_statements=said.stored,
        licence=card.licence,
        tags=card.tags,
        datasets=card.datasets,
        card_text="\n\n".join(text for text in (f"Task: {task}" if task else "", card.prose) if text),
        notes=(*((folder.skipped,) if folder.skipped else ()), *folder.notes, *faults, *card.notes, *notes, *cut),
        files=tuple(FileFields(file.path, file.size, file.sha256, file.hub_hash) for file in files),
        samples=merged,
    )


def read_cards(top: Path, paths: Sequence[str]) -> Card:
    """One card from those among an adapter's files.

    Args:
        top (Path): folder that the paths are relative to.
        paths (Sequence[str]): the adapter's files; cards from the nearest to the top.

    Returns:
        Card: merged, empty where there is none.
    """
    return merge_cards([_card(top / path) for path in paths if path.rsplit("/", 1)[-1] == CARD])


def _card(location: Path) -> Card:
    with location.open("rb") as stream:
        return parse_card(stream.read(CARD_BYTES).decode("utf-8", errors="replace"))


def _storable_facts(facts: AdapterFacts) -> AdapterFacts:
    """The facts, if a database can hold their texts, each of which is one line."""
    strange = [module.name for module in facts.modules if not is_storable(module.name)]
    if strange:
        raise UnsupportedAdapterError(f"{len(strange)} module names cannot be stored, such as {strange[0]!r}")
    base_model = plain(storable(facts.base_model))[:1024] if facts.base_model else None
    return replace(facts, base_model=base_model, notes=tuple(_line(note) for note in facts.notes))


def _line(text: str) -> str:
    """A text about a stranger's file as one line of bounded length."""
    line = plain(text[:LINE_CHARACTERS])
    return line if len(line) <= LINE_CHARACTERS and len(text) <= LINE_CHARACTERS else f"{line[: LINE_CHARACTERS - 1]}…"
