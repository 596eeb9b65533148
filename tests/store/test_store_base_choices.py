"""What the user says about base models: which choice counts, what it changes, and what a composition makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from hub_router.errors import HubRouterError
from hub_router.records import AdapterRecord, BaseChoice, BaseModel
from hub_router.store import base_choices
from hub_router.store.base_choices import ADAPTER, RULE
from hub_router.store.rows import records
from hub_router.store.selection import common_base
from hub_router.store.session import Store
from hub_router.store.tables import STATEMENT, Adapter

AddAdapter = Callable[..., int]


def bases(store: Store) -> dict[int, tuple[str | None, str, list[str]]]:
    with store.read() as session:
        return {
            row.id: (row.base_model_resolved, row.base_model_confidence, row.base_model_evidence)
            for row in session.scalars(select(Adapter))
        }


def test_own_choice_comes_before_the_longest_rule_that_fits() -> None:
    known = [
        BaseChoice(ADAPTER, "ann/one", "own/model"),
        BaseChoice(RULE, "*", "any/model"),
        BaseChoice(RULE, "*/LLAMA-?", "llama/model"),
        BaseChoice(RULE, "ann/*", "ann/model"),
    ]

    def chosen(ref: str, stated: str | None) -> str | None:
        found = base_choices.choose(known, ref, stated)
        return found.id if found else None

    assert chosen("ann/one", "/data/llama-2") == "own/model"
    assert chosen("ann/one", None) == "own/model"
    assert chosen("ann/two", "/data/llama-2") == "llama/model"
    assert chosen("ann/two", "/data/llama-22") == "any/model"
    assert chosen("ANN/one", None) is None
    assert base_choices.choose(known, "x/y", "Ann/z") == BaseModel(
        "ann/model", "certain", ("rule 'ann/*' of the user",)
    )


def test_choices_change_the_rows_and_leave_the_others(store: Store, add_adapter: AddAdapter) -> None:
    with store.write() as session:
        one = add_adapter(session, "ann/one", base_model="/data/llama")
        two = add_adapter(session, "ann/two", "sub", base_model="/data/Llama")
        old = add_adapter(session, "ann/old", base_model="/data/llama", current=False)
        other = add_adapter(session, "bob/x", base_model="org/base")
        assert base_choices.save_choice(session, RULE, "*/llama", "my/llama") == [one, two]
        assert base_choices.save_choice(session, ADAPTER, "ann/two/sub", "my/two") == [two]
    untouched = ("org/base", "none", [])
    assert bases(store) == {
        one: ("my/llama", "certain", ["rule '*/llama' of the user"]),
        two: ("my/two", "certain", ["set by the user"]),
        old: untouched,
        other: untouched,
    }
    with store.read() as session:
        assert base_choices.counted(session) == [
            BaseChoice(ADAPTER, "ann/two/sub", "my/two", 1),
            BaseChoice(RULE, "*/llama", "my/llama", 1),
        ]
    with store.write() as session:
        # The rule is next in line; what the adapter says itself comes last.
        own = {two: BaseModel("own/two", "high", ("own",)), one: BaseModel("own/one", "medium", ("own",), "c" * 40)}
        assert base_choices.delete_choice(session, ADAPTER, "ann/two/sub", own) == [two]
    assert bases(store)[two][0] == "my/llama"
    with store.write() as session:
        assert base_choices.delete_choice(session, RULE, "*/llama", own) == [one, two]
        assert records(session, [one])[one].base_model_revision == "c" * 40
    assert bases(store)[one] == ("own/one", "medium", ["own"])
    assert bases(store)[two] == ("own/two", "high", ["own"])


def test_choice_is_replaced_by_a_later_one_of_the_same_pattern(store: Store, add_adapter: AddAdapter) -> None:
    with store.write() as session:
        one = add_adapter(session, "ann/one")
        base_choices.save_choice(session, ADAPTER, "ann/one", "first/model")
        base_choices.save_choice(session, ADAPTER, "ann/one", "second/model")
        assert [choice.base_model for choice in base_choices.choices(session)] == ["second/model"]
    assert bases(store)[one][0] == "second/model"


def test_choice_follows_a_rename_unless_the_new_name_has_its_own(store: Store, add_adapter: AddAdapter) -> None:
    with store.write() as session:
        moved = add_adapter(session, "ann/new", "sub")
        kept = add_adapter(session, "ann/taken")
        base_choices.save_choice(session, ADAPTER, "ann/old/sub", "my/model")
        base_choices.save_choice(session, ADAPTER, "ann/older", "bad/model")
        base_choices.save_choice(session, ADAPTER, "ann/taken", "good/model")
        base_choices.follow_rename(session, "ann/old", "ann/new")
        base_choices.follow_rename(session, "ann/older", "ann/taken")
        assert [choice.pattern for choice in base_choices.choices(session)] == ["ann/new/sub", "ann/taken"]
    assert (bases(store)[moved][0], bases(store)[kept][0]) == ("my/model", "good/model")


def test_what_an_adapter_says_is_kept_apart_from_its_labels(store: Store, add_adapter: AddAdapter) -> None:
    labels = {STATEMENT: ("card a/b", "tag base_model:c/d"), "tag": ("nice",)}
    with store.write() as session:
        one = add_adapter(session, "ann/one", labels=labels)
    with store.read() as session:
        (entry,) = base_choices.held(session, [one])
        assert (entry.stated, entry.statements) == ("org/base", ("card a/b", "tag base_model:c/d"))
        assert records(session, [one])[one].tags == ("nice",)


@pytest.fixture
def pool(store: Store, add_adapter: AddAdapter) -> dict[str, AdapterRecord]:
    """Adapters of one base model that is sure, guessed, spelled otherwise, another, unknown and a lie."""
    columns = {
        "sure": ("org/base", "high", ["stated"]),
        "guessed": ("org/base", "low", ["a path"]),
        "spelled": ("Org/Base", "high", ["stated"]),
        "other": ("org/other", "medium", ["a copy"]),
        "unknown": (None, "none", ["config: '/x' is a path"]),
        "lie": ("openai-community/gpt2", "contradicted", ["config: names gpt2", "not gpt2: modules q_proj"]),
    }
    with store.write() as session:
        ids = {
            name: add_adapter(
                session,
                f"ann/{name}",
                base_model="/x",
                base_model_resolved=model,
                base_model_confidence=confidence,
                base_model_evidence=evidence,
            )
            for name, (model, confidence, evidence) in columns.items()
        }
        found = records(session, list(ids.values()))
    return {name: found[key] for name, key in ids.items()}


def test_common_base_of_those_that_agree(pool: dict[str, AdapterRecord]) -> None:
    def common(*names: str) -> str:
        return common_base({name: pool[name] for name in names})

    assert common("sure", "guessed", "spelled") == "org/base"
    assert common("spelled", "sure") == "Org/Base"
    assert common("guessed") == "org/base"
    with pytest.raises(HubRouterError, match="2 base models, expected one") as error:
        common("sure", "guessed", "other", "unknown")
    for line in (
        "  - guessed: org/base (low)",
        "  - other: org/other (medium)",
        "  - unknown: names no base model that is known (/x)",
        "--base-model",
        "hub-router bases set",
    ):
        assert line in str(error.value)


def test_common_base_refuses_what_the_tensors_contradict(pool: dict[str, AdapterRecord]) -> None:
    with pytest.raises(HubRouterError) as error:
        common_base({"a": pool["lie"], "b": pool["sure"]})
    assert str(error.value).splitlines()[:2] == [
        "1 of 2 adapters cannot be of the base model that they name:",
        "  - a: openai-community/gpt2 (config: names gpt2; not gpt2: modules q_proj)",
    ]
    assert "hub-router bases set" in str(error.value)
