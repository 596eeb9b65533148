"""Which texts of an adapter stand for its task: the prose of its card, and inputs of its samples.

A card is read for words about the task. Code, links, training logs and metadata say how an adapter was made, and an
encoder sees only the first few hundred tokens. An adapter whose card says nothing is described by its name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from hub_router.store.features import AdapterTexts

SAMPLES = 20
CHARACTERS = 2_000

# Sections that say nothing about the task, by the first words of their headings.
_ASIDE = re.compile(
    r"(training (procedure|hyper|details|results|metrics|config)|framework|environmental|carbon|technical spec|hardware"
    r"|software|citation|cite|bibtex|licen[cs]e|acknowledg|contact|model card (authors|contact)|glossary"
    r"|how to (use|get|load)|usage|getting started|quick ?start|install|inference|example code|requirements"
    r"|bias|limitations|model sources|evaluation results|results|compute)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_FENCE = re.compile(r"^(```|~~~).*?(^\1\s*$|\Z)", re.DOTALL | re.MULTILINE)
_FACT = re.compile(
    r"[-*]?\s*\**(developed by|funded by|shared by|model type|language|licen[cs]e|finetuned from|base[ _]model"
    r"|repository|paper|demo|target modules|peft method|model name|fine-?tuning method|training framework)\b[^:]*:",
    re.IGNORECASE,
)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_TAG = re.compile(r"<[^<>]{1,400}>")
_MARKUP = re.compile(r"[*`|#>\\]+|(?<!\w)_+|_+(?!\w)|-{3,}|={3,}")
# Words that name the kind of thing and not its task.
_GENERIC = frozenset(
    {"adapter", "adapters", "checkpoint", "fine", "finetune", "finetuned", "ft", "generated_from_trainer", "llm"}
    | {"lora", "model", "peft", "qlora", "safetensors", "sft", "text-generation", "transformers", "trl", "tuned"}
    | {"tuning", "unsloth"}
)


@dataclass(frozen=True)
class TaskText:
    """A text that stands for an adapter's task.

    Args:
        kind (str): ``card`` or ``sample``.
        position (int): number within its kind.
        text (str): never empty.
    """

    kind: str
    position: int
    text: str


def task_texts(adapter: AdapterTexts) -> tuple[TaskText, ...]:
    """The texts of an adapter that search embeds.

    Args:
        adapter (AdapterTexts): what the catalog knows.

    Returns:
        tuple[TaskText, ...]: one card text (the name and labels where the card says nothing), then the first
            ``SAMPLES`` sample inputs that are not blank; each of at most ``CHARACTERS`` characters.
    """
    card = card_prose(adapter.card_text)
    named = _name_words(adapter)
    if not card:
        card = " ".join(dict.fromkeys([*named, *_label_words(adapter)]))
    elif adapter.subfolder:
        # Adapters of one repository often share its card, and only their folders tell them apart.
        card = f"{' '.join(named)}: {card}"
    samples = [(position, text) for position, text in enumerate(adapter.samples) if text.strip()][:SAMPLES]
    return (
        TaskText("card", 0, card[:CHARACTERS]),
        *(TaskText("sample", position, text[:CHARACTERS]) for position, text in samples),
    )


def text_hash(instruction: str, text: str) -> str:
    """Identity of an embedded text: sha256 of the encoder's instruction and the text.

    Args:
        instruction (str): the encoder's instruction.
        text (str): the text.

    Returns:
        str: hexadecimal.
    """
    return hashlib.sha256(f"{instruction}\0{text}".encode()).hexdigest()


def card_prose(card: str) -> str:
    """What a card says about its task, as one line.

    Args:
        card (str): markdown without front matter and unfilled template parts.

    Returns:
        str: at most ``CHARACTERS`` characters; empty where nothing is left.
    """
    kept: list[str] = []
    skipped = 0
    for line in _FENCE.sub("", card).splitlines():
        heading = _HEADING.match(line)
        if heading:
            level = len(heading[1])
            if skipped and level > skipped:
                continue
            skipped = level if level > 1 and _ASIDE.match(heading[2].strip("*_ ")) else 0
        if not skipped and not _FACT.match(line.strip()):
            kept.append(heading[2] + "." if heading else line)
    text = _TAG.sub(" ", _LINK.sub(r"\1", _IMAGE.sub(" ", "\n".join(kept))))
    return " ".join(_MARKUP.sub(" ", text).split())[:CHARACTERS].rstrip()


def _name_words(adapter: AdapterTexts) -> list[str]:
    """Words of the adapter's own name, without those that its base model's name explains."""
    parts = adapter.ref.strip("/").split("/")
    named = parts[-1 - len(adapter.subfolder.split("/")) :] if adapter.subfolder else parts[-1:]
    words = [word for part in named for word in re.split(r"[\W_]+", part) if word]
    explained = {word.lower() for word in re.split(r"[\W_]+", adapter.base_model or "")} | _GENERIC
    telling = [word for word in words if word.lower() not in explained]
    return telling or words or parts[-1:]


def _label_words(adapter: AdapterTexts) -> list[str]:
    """Tags and datasets of the card that may name its task."""
    return [label for label in adapter.labels if ":" not in label and label.lower() not in _GENERIC]
