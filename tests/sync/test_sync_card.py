from __future__ import annotations

import time

import pytest

from hub_router.sync.card import PROSE_CHARACTERS, Card, merge_cards, parse_card


def test_metadata_and_prose() -> None:
    card = parse_card(
        "---\nlicense: Apache-2.0\nbase_model: a/b\ntags: [peft, sst2, peft]\ndatasets:\n- glue\n---\n"
        "# Film\n\nFinds moods.\n"
    )
    assert card == Card("apache-2.0", ("peft", "sst2"), ("glue",), ("a/b",), "# Film\n\nFinds moods.")


def test_without_front_matter_all_is_prose() -> None:
    assert parse_card("A text.\n\n---\n\nlicense: mit\n") == Card(prose="A text.\n\n---\n\nlicense: mit")
    assert parse_card("") == Card()
    assert parse_card("---\n---\n") == Card()


def test_carriage_returns_and_byte_order_mark() -> None:
    card = parse_card("\ufeff---\r\nlicense: mit\r\n---\r\ntext\r\n")
    assert (card.licence, card.prose) == ("mit", "text")


@pytest.mark.parametrize(
    ("value", "licence"),
    [
        ("[mit, apache-2.0]", "mit, apache-2.0"),
        ("2024-01-01", "unknown"),
        ("no", "unknown"),
        ("", "unknown"),
        ("license", "unknown"),
        ("{a: b}", "unknown"),
        ("other\nlicense_name: Llama3", "llama3"),
        ("other", "other"),
    ],
)
def test_licence_values_seen_in_the_wild(value: str, licence: str) -> None:
    assert parse_card(f"---\nlicense: {value}\n---\n").licence == licence


def test_wrong_types_count_as_missing() -> None:
    card = parse_card("---\ntags: {a: 1}\ndatasets: [1, [x], null, glue]\nbase_model: 3\n1: 2\n---\n")
    assert (card.tags, card.datasets, card.base_models, card.notes) == ((), ("glue",), (), ())


@pytest.mark.parametrize(
    ("front", "why"),
    [
        ("a: &a [1, 1]\nb: [*a, *a]", "it uses YAML aliases"),
        ("a: " + "[" * 5000, "it is nested more than 20 deep"),
        ("- a\n- b", "expected a mapping, got list"),
        ("a: {b", "while parsing a flow mapping"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("d: 2024-13-45", "month must be in 1..12"),
        ("a: " + "x" * 60_000, "60004 characters, at most 50000 are read"),
    ],
)
def test_hostile_or_broken_metadata_is_ignored_with_a_note(front: str, why: str) -> None:
    card = parse_card(f"---\n{front}\n---\nprose\n")
    assert card.licence == "unknown"
    assert card.prose == "prose"
    assert len(card.notes) == 1
    assert why in card.notes[0]


def test_alias_bomb_costs_no_time() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(20)
    )
    began = time.monotonic()
    assert parse_card(f"---\n{bomb}---\n").notes
    assert time.monotonic() - began < 1.0


def test_texts_that_no_database_holds_are_left_out() -> None:
    card = parse_card('---\ntags: ["a\\0b", "ok", "\\ud800"]\n---\nx\0y\n')
    assert card.tags == ("ok",)
    assert card.prose == "xy"


def test_unfilled_template_leaves_nothing_to_search() -> None:
    text = (
        "---\nbase_model: a/b\n---\n\n# Model Card for Model ID\n\n<!-- Provide a quick summary. -->\n\n"
        "## Model Details\n\n"
        "### Model Description\n\n- **Developed by:** [More Information Needed]\n\n## Training Details\n\n"
        "### Training Data\n\n[More Information Needed]\n\n### Framework versions\n\n- PEFT 0.21.2\n"
    )
    assert parse_card(text).prose == ""


def test_filled_parts_keep_their_headings() -> None:
    text = (
        "# T\n\n## Uses\n\n### Direct\n\n[More Information Needed]\n\n### Other [optional]\n\nFor films.\n\n## Empty\n"
    )
    assert parse_card(text).prose == "# T\n\n## Uses\n\n### Other\n\nFor films."


def test_prose_is_capped() -> None:
    assert len(parse_card("x" * 100_000).prose) == PROSE_CHARACTERS


def test_nearest_card_wins_field_by_field() -> None:
    near, top = Card(tags=("a",), prose="near"), Card("mit", ("b",), ("glue",), ("a/b",), "top", ("note",))
    assert merge_cards([near, top]) == Card("mit", ("a",), ("glue",), ("a/b",), "near", ("note",))
    assert merge_cards([]) == Card()
