"""Base models as the user sets them: for one adapter, or by a rule for all that state the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from hub_router.errors import NotInCatalogError, SettingsError, UnsupportedAdapterError
from hub_router.progress import Progress
from hub_router.records import AdapterFacts, AdapterRecord, BaseChoice, BaseModel
from hub_router.store import adapters as adapter_queries
from hub_router.store import base_choices
from hub_router.store.base_choices import ADAPTER, RULE, HeldBase
from hub_router.store.lookup import closest
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.sync.base_model import Fits


@dataclass(frozen=True)
class Bases:
    """The user's choices of base models; :attr:`hub_router.hub.Hub.bases` gives one.

    A choice is in force at once and for every later sync, until it is removed. One for an adapter comes before every
    rule; of the rules that fit, the one with the longest pattern counts.

    Args:
        store (Store): catalog.
        progress (Progress): where long work reports.
        inspect (Callable[[Path], AdapterFacts]): reads an adapter's folder.
        fits (Fits | None): compares an adapter with a base model whose config is on this machine.
    """

    store: Store
    progress: Progress
    inspect: Callable[[Path], AdapterFacts]
    fits: Fits | None

    def list(self) -> Sequence[BaseChoice]:
        """Every choice: those for adapters, then the rules, each by pattern.

        Returns:
            Sequence[BaseChoice]: each with the number of adapters that it decides.
        """
        with self.store.read() as session:
            return base_choices.counted(session)

    def set(self, ref: AdapterRef, model: str | Path) -> AdapterRecord:
        """Say which base model an adapter has.

        Args:
            ref (AdapterRef): as for :meth:`hub_router.hub.Hub.show`, or a record.
            model (str | Path): Hub id, or folder of a model.

        Returns:
            AdapterRecord: the adapter as it is now.

        Raises:
            NotInCatalogError: no such adapter.
            SettingsError: the model is neither a Hub id nor the folder of a model.
        """
        chosen = model_reference(model)
        with self.store.write() as session:
            record = _find(session, ref)
            base_choices.save_choice(session, ADAPTER, record.ref, chosen)
            return adapter_queries.find(session, record.id)

    def add_rule(self, pattern: str, model: str | Path) -> BaseChoice:
        """Say which base model all adapters have whose config names one that fits a pattern.

        Args:
            pattern (str): shell pattern for ``base_model_name_or_path`` as written, such as ``*/my-llama*``; compared
                without case.
            model (str | Path): as for :meth:`set`.

        Returns:
            BaseChoice: with the number of adapters that it decides now.

        Raises:
            SettingsError: the pattern is empty, or the model is unusable.
        """
        if not pattern.strip():
            raise SettingsError("the pattern is empty, expected one such as '*/my-llama*'")
        chosen = model_reference(model)
        with self.store.write() as session:
            decided = base_choices.save_choice(session, RULE, pattern, chosen)
        return BaseChoice(RULE, pattern, chosen, len(decided))

    def remove(self, choice: AdapterRef) -> BaseChoice:
        """Withdraw a choice; its adapters get the base model that the next choice gives, or that they name themselves.

        Args:
            choice (AdapterRef): the adapter of :meth:`set`, or the pattern of a rule.

        Returns:
            BaseChoice: what was withdrawn, with the number of adapters that it decided.

        Raises:
            NotInCatalogError: there is no such choice; names those that resemble it.
        """
        with self.store.read() as session:
            kind, pattern = _named(session, choice)
            held = base_choices.held(session, base_choices.decided(session, kind, pattern))
        with self.progress.task("Resolving base models", len(held)) as advance:
            resolved: dict[int, BaseModel] = {}
            for entry in held:
                resolved[entry.adapter_id] = self._resolve(entry)
                advance(1)
        return self._withdraw(kind, pattern, resolved)

    def _withdraw(self, kind: str, pattern: str, resolved: Mapping[int, BaseModel]) -> BaseChoice:
        with self.store.write() as session:
            known = {(entry.kind, entry.pattern): entry.base_model for entry in base_choices.choices(session)}
            freed = base_choices.delete_choice(session, kind, pattern, resolved)
        return BaseChoice(kind, pattern, known.get((kind, pattern), ""), len(freed))

    def _resolve(self, entry: HeldBase) -> BaseModel:
        """What an adapter itself says, as a sync would find it."""
        from hub_router.sync.base_model import Statements, resolve

        said = Statements.of_stored(entry.stated, entry.statements)
        try:
            facts = self.inspect(Path(entry.path))
        except (UnsupportedAdapterError, OSError):
            # Its files are gone or were never usable; what it states is in the catalog.
            facts = None
        return resolve(said, facts, self.fits, local=entry.source == "local")


def model_reference(model: str | Path) -> str:
    """What the user means by a base model.

    Args:
        model (str | Path): Hub id, or folder of a model.

    Returns:
        str: the Hub id as written (with its owner, for old models such as ``gpt2``), or the absolute folder.

    Raises:
        SettingsError: neither.
    """
    from hub_router.sync.published import ownerless
    from hub_router.sync.targets import is_repo_id

    text = str(model).strip()
    try:
        folder = Path(text).expanduser().absolute()
        if text and (folder / "config.json").is_file():
            return str(folder)
        there = bool(text) and folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingsError(
            f"base model {text!r} cannot be a folder: {error}; expected a Hub id or a folder"
        ) from error
    if there:
        raise SettingsError(
            f"base model {text!r} is a folder without config.json; expected a model's folder or a Hub id"
        )
    if is_repo_id(text) and not isinstance(model, Path):
        return text
    found = ownerless(text)
    if found is None:
        raise SettingsError(f"base model {text!r} is neither owner/name of a model on the Hub nor an existing folder")
    return found


def _find(session: Session, ref: AdapterRef) -> AdapterRecord:
    return ref if isinstance(ref, AdapterRecord) else adapter_queries.find(session, str(ref))


def _named(session: Session, choice: AdapterRef) -> tuple[str, str]:
    """Kind and pattern of the choice that a user names: an adapter by any of its names, or a rule by its pattern."""
    known = base_choices.choices(session)
    text = choice.ref if isinstance(choice, AdapterRecord) else str(choice)
    for entry in known:
        if entry.pattern == text:
            return entry.kind, text
    try:
        ref = _find(session, choice).ref
    except NotInCatalogError:
        ref = text
    for entry in known:
        if (entry.kind, entry.pattern) == (ADAPTER, ref):
            return ADAPTER, ref
    near = closest(text, [entry.pattern for entry in known], short=lambda pattern: pattern.rsplit("/", 1)[-1])
    hint = f"; closest: {', '.join(near)}" if near else ""
    raise NotInCatalogError(
        f"no base model was set for {text!r}, nor is there such a rule{hint}; see: hub-router bases list"
    )
