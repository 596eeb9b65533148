"""Reads README.md of an adapter: metadata from the front matter, prose for search.

Cards come from strangers: sizes are capped, YAML aliases (which can expand without bound) and deep nesting are refused,
and a value of the wrong type counts as missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from hub_router.records import UNKNOWN_LICENCE, Sample
from hub_router.store.samples import WIDGET_ORIGIN
from hub_router.sync.samples import text_fault
from hub_router.sync.text import is_storable

CARD_BYTES = 1_000_000
FRONT_MATTER_CHARACTERS = 50_000
PROSE_CHARACTERS = 32_000
FAULT_CHARACTERS = 200
LABEL_CHARACTERS = 512
LABELS = 200
WIDGET_EXAMPLES = 100
_DEPTH = 20
_DERIVED = re.compile(r"(?:base_model|dataset|license|region):.*|peft|safetensors", re.DOTALL)
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
# Lines of the Hub's card template, which PEFT writes along with every adapter; what is left is what somebody wrote.
_UNFILLED = re.compile(
    r"\[more information needed\]|^#+ Model Card for Model ID$|^\*\*(?:BibTeX|APA):\*\*$|^- PEFT \d"
    r"|^Users \(both direct and downstream\) should be made aware|^Use the code below to get started"
    r"|^Carbon emissions can be estimated using",
    re.IGNORECASE,
)
# Examples that AutoTrain writes into every card, whatever the adapter's task.
_STOCK_EXAMPLES = ("What is your favorite condiment?", "I love AutoTrain 🤗", "I love AutoTrain")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        licence (str): lower-case id, ``unknown`` where none is stated.
        tags (tuple[str, ...]): card tags.
        datasets (tuple[str, ...]): datasets.
        base_models (tuple[str, ...]): base models.
        prose (str): text without front matter, comments and unfilled template parts.
        notes (tuple[str, ...]): what could not be used, and why.
        widget (tuple[Sample, ...]): examples for the Hub's widget that are texts.
        base_tags (tuple[str, ...]): tags that name a base model, such as ``base_model:adapter:owner/name``.
    """

    licence: str = UNKNOWN_LICENCE
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    prose: str = ""
    notes: tuple[str, ...] = ()
    widget: tuple[Sample, ...] = ()
    base_tags: tuple[str, ...] = ()


def parse_card(text: str) -> Card:
    """Parse a README.md.

    Args:
        text (str): its contents.

    Returns:
        Card: with notes instead of exceptions; a card never makes an adapter unusable.
    """
    match = _FRONT.match(text)
    if not match:
        return Card(prose=clean_prose(text))
    meta, notes = _front_matter(match[1])
    return Card(
        licence=_licence(meta),
        tags=_labels(meta.get("tags")),
        datasets=_labels(meta.get("datasets")),
        base_models=_labels(meta.get("base_model")),
        prose=clean_prose(text[match.end() :]),
        notes=notes,
        widget=_widget(meta.get("widget")),
        base_tags=_base_tags(_labels(meta.get("tags"))),
    )


def merge_cards(cards: Sequence[Card]) -> Card:
    """One card from those of a subfolder and its parents: each field from the nearest card that states it.

    The examples of the widget are those of the nearest card or none.

    Args:
        cards (Sequence[Card]): nearest first; may be empty.

    Returns:
        Card: merged.
    """
    if not cards:
        return Card()
    return replace(
        cards[0],
        licence=next((card.licence for card in cards if card.licence != UNKNOWN_LICENCE), UNKNOWN_LICENCE),
        tags=next((card.tags for card in cards if card.tags), ()),
        datasets=next((card.datasets for card in cards if card.datasets), ()),
        base_models=next((card.base_models for card in cards if card.base_models), ()),
        prose=next((card.prose for card in cards if card.prose), ""),
        base_tags=next((card.base_tags for card in cards if card.base_tags), ()),
        notes=tuple(note for card in cards for note in card.notes),
    )


def hub_card(data: object, tags: object) -> Card:
    """What the Hub states about a repository beside its files.

    Args:
        data (object): ``cardData`` of the Hub's answer.
        tags (object): ``tags`` of the Hub's answer.

    Returns:
        Card: licence, from the tag ``license:...`` where the data names none, and tags without those that the Hub
            derives from the base model, datasets, licence, format and region.
    """
    labels = _labels(tags)
    licence = _licence(data) if isinstance(data, dict) else UNKNOWN_LICENCE
    if licence == UNKNOWN_LICENCE:
        licence = _licence({"license": [label.removeprefix("license:") for label in labels if label[:8] == "license:"]})
    written = _labels(data.get("tags")) if isinstance(data, dict) else ()
    return Card(
        licence=licence,
        tags=tuple(dict.fromkeys((*written, *(label for label in labels if not _DERIVED.fullmatch(label)))))[:LABELS],
        base_tags=_base_tags((*written, *labels)),
    )


def with_hub(card: Card, hub: Card) -> Card:
    """A README's card, completed by what the Hub states.

    Args:
        card (Card): of the README; its licence comes first.
        hub (Card): from :func:`hub_card`.

    Returns:
        Card: with the tags of both.
    """
    licence = hub.licence if card.licence == UNKNOWN_LICENCE else card.licence
    tags = tuple(dict.fromkeys((*card.tags, *hub.tags)))[:LABELS]
    return replace(card, licence=licence, tags=tags, base_tags=_base_tags((*card.base_tags, *hub.base_tags)))


def clean_prose(text: str) -> str:
    """The text of a card that someone wrote: without comments, placeholders and headings with nothing below.

    Args:
        text (str): markdown without front matter.

    Returns:
        str: at most ``PROSE_CHARACTERS`` characters.
    """
    text = re.sub(r"<!--.*?(?:-->|\Z)", "", text, flags=re.DOTALL).replace("\0", "")
    kept: list[str] = []
    headings: list[str] = []
    for line in text.splitlines():
        level = _level(line)
        if level > 1:
            # Headings wait for text below them; one of the same or a higher level shows that they had none.
            headings = [*(waiting for waiting in headings if _level(waiting) < level), line.rstrip()]
        elif not _UNFILLED.search(line.strip()) and (line.strip() or not headings):
            kept += [part for heading in headings for part in ("", heading)]
            kept += [*([""] if headings else []), line.rstrip()]
            headings = []
    prose = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).replace(" [optional]", "")
    return prose.strip()[:PROSE_CHARACTERS]


def _level(line: str) -> int:
    """Level of a markdown heading, 0 for other lines."""
    match = re.match(r"(#{1,6})\s", line)
    return len(match[1]) if match else 0


def _front_matter(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    if len(text) > FRONT_MATTER_CHARACTERS:
        return {}, (f"card metadata ignored: {len(text)} characters, at most {FRONT_MATTER_CHARACTERS} are read",)
    try:
        fault = _hostile(text)
        meta = None if fault else yaml.safe_load(text)
    # What PyYAML lets through: impossible dates and numbers, keys and tags of wrong types, scalars that are not of the
    # type that their tag states.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        fault = (str(error).splitlines() or [type(error).__name__])[0][:FAULT_CHARACTERS]
    if fault:
        return {}, (f"card metadata ignored: {fault}",)
    if meta is not None and not isinstance(meta, dict):
        return {}, (f"card metadata ignored: expected a mapping, got {type(meta).__name__}",)
    return meta or {}, ()


def _hostile(text: str) -> str:
    """Why a YAML text must not be loaded, empty if it may; reads events only, so nothing is expanded."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            return "it uses YAML aliases"
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        if depth > _DEPTH:
            return f"it is nested more than {_DEPTH} deep"
    return ""


def _licence(meta: dict[str, Any]) -> str:
    stated = _labels(meta.get("license"))
    if stated == ("other",):
        stated = _labels(meta.get("license_name")) or stated
    named = [name.lower() for name in stated if name.lower() not in ("license", "licence", "none", "[]")]
    return ", ".join(named)[:255] or UNKNOWN_LICENCE


def _widget(value: object) -> tuple[Sample, ...]:
    """The examples of a widget that are one text each, with the output where that is a text too.

    An example is ``{text, output: {text}}`` or ``{messages: [{role: user, content}]}``. Those with a second input (an
    image, a context, a longer conversation) are left out, for their text alone is not what the model sees.
    """
    found: dict[str, Sample] = {}
    for entry in (value if isinstance(value, list) else [value])[:WIDGET_EXAMPLES]:
        if not isinstance(entry, dict) or "src" in entry or "context" in entry:
            continue
        text, output = entry.get("text"), entry.get("output")
        messages = entry.get("messages")
        if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
            text = messages[0].get("content") if messages[0].get("role") == "user" else None
        answer = output.get("text") if isinstance(output, dict) else None
        answer = answer if isinstance(answer, str) else ""
        if isinstance(text, str) and text.strip() not in _STOCK_EXAMPLES and not text_fault(text, answer):
            found.setdefault(text, Sample(text, answer, "sample", WIDGET_ORIGIN))
    return tuple(found.values())


def _base_tags(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag for tag in tags if tag.startswith("base_model:")))[:LABELS]


def _labels(value: object) -> tuple[str, ...]:
    """Texts of a scalar or list, each once and on one line; values of other types are left out."""
    entries = value if isinstance(value, list) else [value]
    texts = (" ".join(entry.split()) for entry in entries if isinstance(entry, str) and is_storable(entry))
    return tuple(dict.fromkeys(text for text in texts if 0 < len(text) <= LABEL_CHARACTERS))[:LABELS]
