"""Which model an adapter was trained on: what its config, card, tags and manifest say, weighed and held to its tensors.

Adapters are often trained from a local copy, a quantised one or one that was renamed, so what they state is read by the
rules of :mod:`hub_router.sync.base_names`. How sure the answer is, is one of :data:`hub_router.records.CONFIDENCES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from hub_router.records import AdapterFacts, BaseModel
from hub_router.sync.base_names import Reading, quoted, read_name
from hub_router.sync.families import misfit
from hub_router.sync.text import is_storable, storable

# Says whether an adapter's tensors fit a model (id or folder) whose config is on this machine: empty where they do,
# else the misfit in one line, None where the config is not here. It must ask the Hub nothing.
Fits = Callable[[AdapterFacts, str], str | None]

_RELATION = re.compile(r"base_model:(?:(?:adapter|finetune|merge|quantized):)?")
# A database row holds so many characters of a statement; no id and no path that tells anything is longer.
_STATEMENT = 500
# Different models that a card and tags name; what names more is a list of something else.
_OTHERS = 8
_CLASS = 100


@dataclass(frozen=True)
class Statements:
    """Everything that is said about the base model of one adapter.

    Args:
        config (str | None): ``base_model_name_or_path`` of adapter_config.json.
        cards (tuple[str, ...]): ``base_model`` of the card.
        tags (tuple[str, ...]): tags ``base_model:...`` of the card and of the Hub.
        manifest (str | None): what a collection states about all its members.
    """

    config: str | None = None
    cards: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    manifest: str | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """The statements beside the config's as the catalog keeps them, to be resolved anew without asking the Hub."""
        kept = [
            *(f"card {text}" for text in self.cards),
            # The Hub and PEFT make tags from the card; what it says already need not be kept twice.
            *(f"tag {text}" for text in self.tags if _RELATION.sub("", text, count=1) not in self.cards),
            *([f"manifest {self.manifest}"] if self.manifest else []),
        ]
        return tuple(sorted({text for text in kept if len(text) <= _STATEMENT and is_storable(text)}))

    @classmethod
    def of_stored(cls, config: str | None, stored: Sequence[str]) -> Statements:
        """Statements from :attr:`stored`."""
        by_source: dict[str, list[str]] = {"card": [], "tag": [], "manifest": []}
        for text in stored:
            source, _, value = text.partition(" ")
            by_source[source].append(value)
        manifest = next(iter(by_source["manifest"]), None)
        return cls(config, tuple(by_source["card"]), tuple(by_source["tag"]), manifest)


@dataclass(frozen=True)
class _Weighed:
    """An answer before it is held to the tensors; ``guess`` marks one that only a folder's name suggests."""

    found: BaseModel
    guess: bool = False
    others: tuple[str, ...] = ()


def resolve(
    said: Statements, facts: AdapterFacts | None = None, fits: Fits | None = None, *, local: bool = False
) -> BaseModel:
    """The base model of an adapter.

    Args:
        said (Statements): what is stated about it.
        facts (AdapterFacts | None): its tensors; None where they cannot be read.
        fits (Fits | None): compares the tensors with a model whose config is on this machine.
        local (bool): the adapter was trained on this machine, so an absolute path may be the base model itself.

    Returns:
        BaseModel: its id is a Hub id, or for a local adapter an existing folder; evidence in the order of the search.
    """
    weighed = _weigh(said)
    if local and weighed.found.confidence in ("low", "none"):
        weighed = _of_folder(said.config or "", weighed)
    found = _hold(weighed, facts, fits) if facts else weighed.found
    return replace(found, evidence=tuple(storable(line) for line in found.evidence))


def _weigh(said: Statements) -> _Weighed:
    """What the statements come to."""
    stated = (said.config or "").strip()
    config = read_name(stated)
    first = (
        f"config: base_model_name_or_path {quoted(stated)} {config.fact}" if stated else "config names no base model"
    )
    others = list(islice(_others(said), _OTHERS))
    manifest = read_name(said.manifest or "")
    if config.confidence in ("high", "medium"):
        return _of_config(config, first, others, manifest)
    if others:
        return _of_card(config, first, others)
    if manifest.id and manifest.confidence in ("high", "medium"):
        line = _line("manifest", said.manifest or "", manifest)
        return _Weighed(BaseModel(manifest.id, "medium", (first, line)))
    return _Weighed(BaseModel(config.id, config.confidence, (first,), config.revision), guess=True)


def _others(said: Statements) -> Iterator[tuple[Reading, str]]:
    """The card's and the tags' statements that name a model, with their lines; a tag that repeats the card is none."""
    seen: set[str] = set()
    # Sorted, so that what the catalog keeps of them resolves to the same again.
    stated = [("card: base_model", text, text) for text in sorted(said.cards)]
    stated += [("tag", tag, _RELATION.sub("", tag, count=1)) for tag in sorted(said.tags)]
    for source, text, named in stated:
        reading = read_name(named)
        if reading.id and reading.confidence in ("high", "medium") and reading.id.lower() not in seen:
            seen.add(reading.id.lower())
            yield reading, _line(source, text, reading)


def _line(source: str, text: str, reading: Reading) -> str:
    if source == "tag":
        return f"tag {text}"
    same = reading.id is not None and reading.id.lower() == text.strip().lower()
    return f"{source} names {reading.id}" if same else f"{source} names {reading.id}: {quoted(text)} {reading.fact}"


def _of_config(config: Reading, first: str, others: Sequence[tuple[Reading, str]], manifest: Reading) -> _Weighed:
    """The config names a model: do the others agree?"""
    same = [(reading, line) for reading, line in others if _is_same(reading, config)]
    evidence = [first, *(line for _, line in same)]
    confidence = "high" if any(reading.confidence == "high" for reading, _ in same) else config.confidence
    if manifest.id and not _is_same(manifest, config):
        evidence.append(f"manifest names {manifest.id}")
    different = tuple(reading.id or "" for reading, _ in others if not same)
    if different:
        evidence += [line for _, line in others]
        confidence = "low"
    return _Weighed(BaseModel(config.id, confidence, tuple(evidence), config.revision), others=different)


def _of_card(config: Reading, first: str, others: Sequence[tuple[Reading, str]]) -> _Weighed:
    """The config names none, or only a folder that looks like one: the card or a tag decides."""
    chosen = next((reading for reading, _ in others if _is_same(reading, config)), others[0][0])
    unsure = config.id is not None and not _is_same(chosen, config)
    unsure |= len(others) > 1 and not _is_same(chosen, config)
    found = BaseModel(chosen.id, "low" if unsure else "medium", (first, *(line for _, line in others)), chosen.revision)
    return _Weighed(found, others=tuple(reading.id or "" for reading, _ in others if reading is not chosen))


def _is_same(one: Reading, other: Reading) -> bool:
    return bool(one.id and other.id and one.id.lower() == other.id.lower())


def _of_folder(stated: str, weighed: _Weighed) -> _Weighed:
    """The folder that a local adapter's config names, if it is there and holds a model."""
    path = Path(stated.strip())
    try:
        there = path.is_absolute() and (path / "config.json").is_file()
    except (OSError, ValueError):
        # A text that cannot be a path names no folder.
        there = False
    if not there:
        return weighed
    line = f"config: base_model_name_or_path {quoted(stated.strip())} is a folder of this machine that holds a model"
    return _Weighed(BaseModel(str(path), "medium", (line, *weighed.found.evidence[1:])))


def _hold(weighed: _Weighed, facts: AdapterFacts, fits: Fits | None) -> BaseModel:
    """Compare what was found with the adapter's tensors; where statements differ, the first that fits is taken."""
    found = weighed.found
    if facts.base_class:
        found = replace(found, evidence=(*found.evidence, f"auto_mapping says {facts.base_class[:_CLASS]}"))
    if found.id is None:
        return found
    verdict, fault = _compare(found.id, facts, fits)
    if verdict == "fits":
        surer = "certain" if found.confidence in ("high", "medium") else "medium"
        line = f"its tensors fit the architecture of {found.id}"
        return replace(found, confidence=surer, evidence=(*found.evidence, line))
    if verdict == "unknown":
        return found
    found = replace(found, evidence=(*found.evidence, f"not {found.id}: {fault}"))
    for other in weighed.others:
        verdict, _ = _compare(other, facts, fits)
        if verdict != "misfit":
            proof = (f"its tensors fit the architecture of {other}",) if verdict == "fits" else ()
            return BaseModel(other, "medium" if proof else "low", (*found.evidence, *proof))
    if weighed.guess:
        # Nobody claimed it, so nothing is contradicted: the guess was wrong.
        return replace(found, id=None, confidence="none", revision=None)
    return replace(found, confidence="contradicted")


def _compare(model: str, facts: AdapterFacts, fits: Fits | None) -> tuple[str, str]:
    """``fits``, ``misfit`` or ``unknown``, and the misfit: by the model's config where it is here, else by names."""
    fault = fits(facts, model) if fits else None
    if fault is None:
        fault = misfit(model, facts)
        return ("misfit" if fault else "unknown"), fault
    return ("misfit" if fault else "fits"), fault
