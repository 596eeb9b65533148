from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest

from hub_router.search.texts import CHARACTERS, SAMPLES, card_prose, task_texts, text_hash
from hub_router.store.features import AdapterTexts
from hub_router.sync.card import parse_card

TEMPLATE = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"

CARD = """
# SST-2 sentiment

![logo](https://example.org/logo.png)
Decides whether a *review* is **positive**, see [the paper](https://example.org/paper) and `sst2`.

- **Developed by:** somebody
- **Base model:** org/base
- Works on single sentences.

## Usage

Load it like this:

### In Python

```python
from peft import PeftModel
# a comment, no heading
```

## Uses

Sorting <b>shop</b> reviews.

## Training procedure

lr 1e-4

### Framework versions

- PEFT 0.5.0

## Citation

Somebody 2024

## Data

The Stanford treebank.
"""


def texts(ref: str = "org/name", card: str = "", **fields: object) -> AdapterTexts:
    values = {"adapter_id": 1, "ref": ref, "card_text": card, "samples": ()} | fields
    return AdapterTexts(**values)


def only(adapter: AdapterTexts) -> str:
    (text,) = task_texts(adapter)
    assert (text.kind, text.position) == ("card", 0)
    return text.text


def test_card_keeps_what_it_says_about_the_task() -> None:
    assert card_prose(CARD) == (
        "SST-2 sentiment. Decides whether a review is positive , see the paper and sst2 . - Works on single sentences. "
        "Uses. Sorting shop reviews. Data. The Stanford treebank."
    )


def test_empty_template_leaves_the_name() -> None:
    text = TEMPLATE.read_text()
    for start, end in (("{{", "}}"),):
        while start in text:
            head, _, rest = text.partition(start)
            inner, _, tail = rest.partition(end)
            default = inner.split("default(", 1)[1].split(",")[0].strip(" \"'") if "default(" in inner else ""
            text = head + default + tail
    card = parse_card(text)
    assert card_prose(card.prose) == ""
    assert only(texts("lorahub/flan_t5_large-coqa", card.prose, base_model="google/flan-t5-large")) == "coqa"


def test_trainer_card_keeps_its_dataset() -> None:
    card = (
        "# train_2026\n\nThis model is a fine-tuned version of [org/base](https://huggingface.co/org/base) on the "
        "spam_not_spam dataset.\n\n## Training procedure\n\n### Training hyperparameters\n\n- seed: 42\n\n"
        "### Training results\n\n| Loss | Epoch |\n|---|---|\n| 0.1 | 1 |\n"
    )
    assert (
        card_prose(card) == "train_2026. This model is a fine-tuned version of org/base on the spam_not_spam dataset."
    )


def test_unclosed_fence_and_unclosed_tags() -> None:
    assert card_prose("Sorts mail.\n```\nnever closed\n# not a heading") == "Sorts mail."
    assert card_prose("where a < b and " + "<" * 5000) == "where a < b and " + "<" * (CHARACTERS - 16)


def test_long_cards_are_cut() -> None:
    # Also where a language puts no spaces between words.
    assert card_prose("短評を分類する。" * 1000) == ("短評を分類する。" * 1000)[:CHARACTERS]


@pytest.mark.parametrize(
    ("ref", "base", "labels", "expected"),
    [
        ("org/Mistral-7B-v0.1-lora-boolq", "mistralai/Mistral-7B-v0.1", (), "boolq"),
        ("org/lora", "org/base", (), "lora"),
        ("org/base", "org/base", ("glue", "lora", "region:us", "sst2"), "base glue sst2"),
        ("/home/me/my-adapters/mail_sorter", None, (), "mail sorter"),
        ("org/___", None, (), "___"),
        ("org/task_075", "org/base", ("task", "Reviews"), "task 075 Reviews"),
    ],
)
def test_adapter_without_card_is_its_name(ref: str, base: str | None, labels: tuple[str, ...], expected: str) -> None:
    assert only(texts(ref, base_model=base, labels=labels)) == expected


def test_adapters_that_share_a_card_are_told_apart_by_their_folders() -> None:
    shared = {"card": "Ten adapters for retrieval.", "base_model": "ibm/granite-4.1-3b"}
    first, second = (
        only(texts(f"ibm/granitelib/{folder}/granite-4.1-3b/lora", subfolder=f"{folder}/granite-4.1-3b/lora", **shared))
        for folder in ("query_rewrite", "answerability")
    )
    assert first == "granitelib query rewrite: Ten adapters for retrieval."
    assert second == "granitelib answerability: Ten adapters for retrieval."


def test_first_samples_that_are_not_blank() -> None:
    inputs = ("first", "  \n", *(f"input {n}" for n in range(40)))
    found = task_texts(texts(card="Card.", samples=inputs))
    assert [(text.kind, text.position) for text in found[:4]] == [
        ("card", 0),
        ("sample", 0),
        ("sample", 2),
        ("sample", 3),
    ]
    assert len(found) == 1 + SAMPLES
    assert found[1].text == "first"
    (_, cut) = task_texts(texts(card="Card.", samples=("x" * 10_000,)))
    assert cut.text == "x" * CHARACTERS


def test_hash_depends_on_instruction_and_text() -> None:
    assert text_hash("Do: ", "it") == hashlib.sha256(b"Do: \0it").hexdigest()
    assert len({text_hash("Do: ", "it"), text_hash("Do:", " it"), text_hash("", "Do: it")}) == 3
