"""Hub: the catalog and the engine in one object; the only place where the two halves meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hub_router.errors import HubRouterError, MethodError, NotInCatalogError
from hub_router.progress import SILENT, Progress
from hub_router.records import AdapterRecord, CompositionRecord, IndexSummary
from hub_router.settings import Settings
from hub_router.store import adapters as adapter_queries
from hub_router.store import compositions as composition_queries
from hub_router.store import features as feature_queries
from hub_router.store.adapters import Filters
from hub_router.store.session import Store, open_store

if TYPE_CHECKING:
    from hub_router.compose.routed import RoutedModel
    from hub_router.evaluate.comparison import Comparison
    from hub_router.search.ranking import Hit
    from hub_router.sync.run import SyncSummary

AdapterRef = "str | Path | AdapterRecord"


class Hub:
    """A catalog of adapters in one home folder, and the models composed from it.

    Args:
        home (str | Path | None): folder of the catalog; default ``HUB_ROUTER_HOME``, else ``~/.hub_router``.
        database_url (str | None): SQLAlchemy URL; default ``HUB_ROUTER_DATABASE_URL``, else SQLite in the home.
        progress (Progress): where long work reports; silent by default.

    Raises:
        SettingsError: the home is not a folder.
        SchemaError: the database belongs to another release.
    """

    def __init__(
        self,
        home: str | Path | None = None,
        database_url: str | None = None,
        *,
        progress: Progress = SILENT,
    ) -> None:
        self.settings = Settings.resolve(home, database_url)
        self.progress = progress
        self.store: Store = open_store(self.settings.database_url)

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the database connections."""
        self.store.close()

    def sync(
        self,
        *targets: str | Path,
        base_model: str | None = None,
        author: str | None = None,
        collection: str | Path | None = None,
        limit: int | None = None,
        revision: str | None = None,
        workers: int = 8,
        dry_run: bool = False,
    ) -> SyncSummary:
        """Bring the catalog up to date with repositories on the Hub and with local folders.

        Args:
            *targets (str | Path): ``owner/repo``, ``owner/repo/subfolder``, or a local folder.
            base_model (str | None): also every adapter the Hub lists for this base model.
            author (str | None): also every adapter of this author.
            collection (str | Path | None): also the members of a manifest (name of a bundled one, or a TOML file).
            limit (int | None): at most this many repositories from listings.
            revision (str | None): branch, tag or commit; default the main branch.
            workers (int): parallel downloads.
            dry_run (bool): look, but download and write nothing.

        Returns:
            SyncSummary: the outcome of every adapter, with the reason where it was not added.

        Raises:
            HubError: a listing itself could not be read.
            ManifestError: the collection is malformed.
        """
        from hub_router.lora.facts import inspect
        from hub_router.sync.run import SyncRequest, sync

        request = SyncRequest(
            targets=tuple(targets),
            base_model=base_model,
            author=author,
            collection=collection,
            limit=limit,
            revision=revision,
            workers=workers,
            dry_run=dry_run,
        )
        return sync(self.store, request, inspect, self.progress)

    def index(self, encoder: str | None = None) -> IndexSummary:
        """Compute every feature that is missing or stale: spectra, text embeddings, the FAISS index.

        Args:
            encoder (str | None): sentence-transformers model, ``offline`` for the packaged one; default the one the
                catalog was indexed with, else ``hkunlp/instructor-base``.

        Returns:
            IndexSummary: what was computed, what was current already, and what failed with its reason.

        Raises:
            EncoderUnavailableError: the encoder is neither cached nor reachable; spectra are kept.
        """
        from hub_router.search.embed import embed_missing
        from hub_router.search.encoder import load_encoder
        from hub_router.search.index import refresh_index

        spectra, failed = self._index_spectra()
        chosen = load_encoder(self._encoder_name(encoder))
        embedded = embed_missing(self.store, chosen, self.progress)
        refresh_index(self.store, self.settings.index_dir, chosen.name)
        return IndexSummary(
            spectra=spectra,
            embedded=embedded.embedded,
            unchanged=embedded.unchanged,
            encoder=chosen.name,
            failed=failed,
        )

    def search(
        self,
        text: str,
        *,
        base_model: str | None = None,
        licence: str | None = None,
        rank: int | None = None,
        target: str | None = None,
        tag: str | None = None,
        limit: int = 10,
        encoder: str | None = None,
    ) -> list[Hit]:
        """Adapters whose card or samples lie nearest to a task described in words, best first.

        Args:
            text (str): a task, a question or an example input.
            base_model (str | None): only adapters of this base model.
            licence (str | None): only this licence (``unknown`` is a value).
            rank (int | None): only adapters in which this rank occurs.
            target (str | None): only adapters of this target, such as ``q_proj``.
            tag (str | None): only adapters with this tag.
            limit (int): number of hits.
            encoder (str | None): as for :meth:`index`.

        Returns:
            list[Hit]: each with ``adapter``, ``score`` (cosine) and the text that matched.

        Raises:
            NotInCatalogError: nothing is indexed yet.
        """
        from hub_router.search.encoder import load_encoder
        from hub_router.search.ranking import search

        if not text.strip():
            raise HubRouterError("search text is empty, expected a task in words, e.g. 'is this review positive?'")
        chosen = load_encoder(self._encoder_name(encoder))
        vector = chosen.encode([text])[0]
        filters = Filters(base_model=base_model, licence=licence, rank=rank, target=target, tag=tag)
        return search(self.store, self.settings.index_dir, chosen.name, vector, filters, limit)
