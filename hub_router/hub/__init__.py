"""Hub: the catalog and the engine in one object. This package is the only place where the two halves meet.

The class says what can be done; what takes both halves to do lies in one file per noun beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.hub import checking, composing, conversion, reporting, training
from hub_router.hub.bases import Bases
from hub_router.hub.expertstraining import train_experts
from hub_router.hub.indexing import index_spectra
from hub_router.hub.prototypes import PrototypeSets
from hub_router.hub.samples import Samples
from hub_router.hub.training import AdapterSummary, TrainingSummary
from hub_router.hub.trainingoptions import EXPERTS, JOINT_METHODS
from hub_router.progress import SILENT, Progress
from hub_router.records import (
    SEARCH_BY,
    AdapterCheck,
    AdapterDetails,
    AdapterFacts,
    AdapterRecord,
    CompositionRecord,
    IndexSummary,
    RepoRecord,
)
from hub_router.settings import Settings
from hub_router.store import adapters as adapter_queries
from hub_router.store import compositions as composition_queries
from hub_router.store import features as feature_queries
from hub_router.store import schema
from hub_router.store.adapters import Filters
from hub_router.store.schema import SchemaStatus
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store, open_store
from hub_router.store.unserved import unserved

if TYPE_CHECKING:
    from hub_router.composition.routed import RoutedModel
    from hub_router.evaluate.comparison import Comparison
    from hub_router.evaluate.pool import PoolReport
    from hub_router.routing.registry import MethodInfo
    from hub_router.search.ranking import Hit
    from hub_router.sync.run import SyncSummary


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
        checkpoints: str = "newest",
        convert_rank: int | float | None = None,
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
            dry_run (bool): look, but download, convert and write nothing.
            checkpoints (str): of folders ``checkpoint-N`` that stand for one adapter, the ``newest`` or ``all``.
            convert_rank (int | float | None): also convert adapters of other PEFT types to LoRA of this rank, or of the
                ranks that keep this share of the energy; see :func:`hub_router.lora.convert.convert`.

        Returns:
            SyncSummary: the outcome of every adapter, with the reason where it was not added.

        Raises:
            SettingsError: a target or the rank cannot be used.
            HubError: a listing itself could not be read.
            ManifestError: the collection is malformed.
        """
        from hub_router.lora.convertible import check_rank
        from hub_router.sync.run import SyncRequest, sync

        rank = None if convert_rank is None else check_rank(convert_rank)
        request = SyncRequest(
            targets=tuple(targets),
            base_model=base_model,
            author=author,
            collection=collection,
            limit=limit,
            revision=revision,
            workers=workers,
            dry_run=dry_run,
            checkpoints=checkpoints,
        )
        inspect = conversion.noting(_inspect, self.settings.home)
        summary = sync(self.store, request, inspect, self.progress, fits=_fits)
        if rank is None:
            return summary

        def add(folders: tuple[Path, ...]) -> SyncSummary:
            return sync(self.store, SyncRequest(targets=folders), inspect, self.progress, fits=_fits)

        return conversion.convert_unsupported(self.store, self.settings.home, summary, rank, add, self.progress)

    def convertible(self, summary: SyncSummary) -> Sequence[str]:
        """The unsupported adapters of a run that :meth:`sync` converts where it is given a ``convert_rank``.

        Args:
            summary (SyncSummary): of the run.

        Returns:
            Sequence[str]: references.
        """
        return conversion.convertible_refs(self.store, summary)

    def index(self, encoder: str | None = None) -> IndexSummary:
        """Compute every feature that is missing or stale: spectra, embeddings, Gaussians of samples, FAISS indexes.

        Args:
            encoder (str | None): sentence-transformers model, ``offline`` for the packaged one; default the one the
                catalog was indexed with, else ``hkunlp/instructor-base``.

        Returns:
            IndexSummary: what was computed, what was current already, and what failed with its reason.

        Raises:
            EncoderUnavailableError: the encoder is neither cached nor reachable; spectra are kept.
        """
        from hub_router.encoder import load_encoder
        from hub_router.search.embed import embed_missing
        from hub_router.search.gaussian_index import refresh_gaussian_index
        from hub_router.search.gaussians import fit_missing
        from hub_router.search.index import refresh_index

        spectra, failed = index_spectra(self.store, self.progress)
        chosen = load_encoder(self._encoder_name(encoder))
        embedded = embed_missing(self.store, chosen, self.progress)
        gaussians = fit_missing(self.store, chosen.name, self.progress)
        refresh_index(self.store, self.settings.index_dir, chosen.name)
        refresh_gaussian_index(self.store, self.settings.index_dir, chosen.name)
        return IndexSummary(
            spectra=spectra,
            embedded=embedded.embedded,
            gaussians=gaussians,
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
        by: str = "cosine",
        epsilon: float | None = None,
    ) -> list[Hit]:
        """Adapters whose card or samples lie nearest to a task described in words, best first.

        Args:
            text (str): a task, a question or an example input; by likelihood, an input.
            base_model (str | None): only adapters of this base model.
            licence (str | None): only this licence (``unknown`` is a value).
            rank (int | None): only adapters in which this rank occurs.
            target (str | None): only adapters of this target, such as ``q_proj``.
            tag (str | None): only adapters with this tag.
            limit (int): number of hits.
            encoder (str | None): as for :meth:`index`.
            by (str): ``cosine`` of the nearest text, or ``likelihood`` of the input among the samples of the adapter's
                task, for adapters with at least two samples; see :mod:`hub_router.search.likelihood`.
            epsilon (float | None): for likelihoods: variance added in every direction, default 1e-5.

        Returns:
            list[Hit]: each with ``adapter``, ``score`` (cosine, or log-likelihood per dimension) and the text that
            matched.

        Raises:
            NotInCatalogError: nothing is indexed yet, or no adapter has the samples that a likelihood needs.
        """
        if by not in SEARCH_BY or (epsilon is not None and by != "likelihood"):
            given = f"{by!r}" if epsilon is None else f"{by!r} with epsilon {epsilon}"
            raise HubRouterError(
                f"search by {given}: expected one of {', '.join(SEARCH_BY)}, and epsilon only by likelihood (--by NAME)"
            )
        if not text.strip():
            raise HubRouterError("search text is empty, expected a task in words, e.g. 'is this review positive?'")
        with self.store.read() as session:
            # Asked first, because loading an encoder takes seconds or a download.
            if not feature_queries.encoders(session):
                raise NotInCatalogError(
                    "nothing is indexed for search yet; run: hub-router sync OWNER/REPO, then: hub-router index"
                )
        from hub_router.encoder import load_encoder
        from hub_router.search.likelihood import EPSILON, search_likelihood
        from hub_router.search.ranking import search

        chosen = load_encoder(self._encoder_name(encoder))
        asked = (chosen.name, chosen.encode([text])[0], _filters(base_model, licence, rank, target, tag), limit)
        if by == "cosine":
            return search(self.store, self.settings.index_dir, *asked)
        return search_likelihood(self.store, self.settings.index_dir, *asked, EPSILON if epsilon is None else epsilon)

    def list(
        self,
        *,
        base_model: str | None = None,
        licence: str | None = None,
        rank: int | None = None,
        target: str | None = None,
        tag: str | None = None,
        statuses: Sequence[str] = ("ready",),
        limit: int | None = None,
    ) -> list[AdapterRecord]:
        """Adapters in the catalog, by name; the filters are those of :meth:`search`.

        Args:
            base_model (str | None): only adapters of this base model.
            licence (str | None): only this licence.
            rank (int | None): only adapters in which this rank occurs.
            target (str | None): only adapters of this target.
            tag (str | None): only adapters with this tag.
            statuses (Sequence[str]): statuses to list; ``ready`` adapters are those that can be composed.
            limit (int | None): at most this many.

        Returns:
            list[AdapterRecord]: one per adapter, newest revision only.
        """
        filters = _filters(base_model, licence, rank, target, tag)
        with self.store.read() as session:
            return adapter_queries.list_records(session, filters, limit=limit, statuses=tuple(statuses))

    def show(self, ref: str) -> AdapterDetails:
        """Everything known about one adapter.

        Args:
            ref (str): ``owner/repo``, ``owner/repo/subfolder``, a local folder, a catalog id or an unambiguous name.

        Returns:
            AdapterDetails: record, card, files, samples, spectra.

        Raises:
            NotInCatalogError: no such adapter; names the nearest ones.
        """
        with self.store.read() as session:
            record = adapter_queries.find(session, ref)
            return adapter_queries.details(session, record)

    def repositories(self, statuses: Sequence[str]) -> Sequence[RepoRecord]:
        """Repositories that were synced and gave no adapter, by name, with the reason.

        Args:
            statuses (Sequence[str]): statuses to list: ``unsupported gated missing failed``.
        """
        with self.store.read() as session:
            return unserved(session, statuses)

    @property
    def bases(self) -> Bases:
        """Base models as the user sets them: for one adapter, or by a rule."""
        return Bases(self.store, self.progress, _inspect, _fits)

    @property
    def samples(self) -> Samples:
        """Examples of the adapters' tasks: list them, add your own, remove those again."""
        return Samples(self.store, self.progress)

    @property
    def prototypes(self) -> PrototypeSets:
        """Trained prototype sets, in versions: list, compare, export and import them."""
        return PrototypeSets(self.store)

    def values(self, statuses: Sequence[str] = ("ready",)) -> Mapping[str, Mapping[str, int]]:
        """The values that each filter of :meth:`list` can be given, with the number of adapters that have it.

        Args:
            statuses (Sequence[str]): statuses of the adapters counted.

        Returns:
            Mapping[str, Mapping[str, int]]: by filter; ``status`` counts the adapters of every status.
        """
        with self.store.read() as session:
            return adapter_queries.values(session, statuses)

    def check(self, *refs: str | Path, base_model: str | None = None) -> Sequence[AdapterCheck]:
        """Read adapters and hold them against a base model's architecture, before anything is loaded.

        Args:
            *refs (str | Path): adapters of the catalog, or folders, synced or not, that are adapters or hold some.
            base_model (str | None): Hub id or folder; only its config is read. None only reads the adapters.

        Returns:
            Sequence[AdapterCheck]: verdict, notes, and every module of every adapter, whether it fits or how not.

        Raises:
            NotInCatalogError: a reference is neither a folder nor in the catalog.
            MissingError: the base model's config cannot be had, or transformers does not know the architecture.
        """
        return checking.check(self.store, refs, base_model, self.progress)

    def define(
        self,
        name: str,
        adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
        method: str = "arrow",
        *,
        base_model: str | None = None,
        replace: bool = False,
        **hyperparameters: Any,
    ) -> CompositionRecord:
        """Check a composition against the base model's architecture and store it, without loading any weights of it.

        Args:
            name (str): name to store it under.
            adapters (Mapping | Iterable): adapters of the catalog, as records, hits' ``adapter`` or names; a mapping
                gives them names of the user's choice. Axis E follows this order.
            method (str): routing method.
            base_model (str | None): base model; default the one that all adapters name.
            replace (bool): overwrite a composition of the same name.
            **hyperparameters (Any): settings of the method.

        Returns:
            CompositionRecord: as stored.

        Raises:
            NotInCatalogError: an adapter is not in the catalog.
            IncompatibleAdaptersError: lists every mismatch.
            MethodError: the method or a setting is unknown or unusable.
        """
        return composing.define(self.store, name, adapters, method, base_model, replace, hyperparameters)

    def compose(
        self,
        name: str,
        adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
        method: str = "arrow",
        *,
        base_model: str | None = None,
        replace: bool = False,
        device: str | None = None,
        **hyperparameters: Any,
    ) -> RoutedModel:
        """:meth:`define` a composition, then :meth:`load` it.

        Args:
            name (str): name to store it under.
            adapters (Mapping | Iterable): as for :meth:`define`.
            method (str): routing method.
            base_model (str | None): base model; default the one that all adapters name.
            replace (bool): overwrite a composition of the same name.
            device (str | None): as for :meth:`load`.
            **hyperparameters (Any): settings of the method.

        Returns:
            RoutedModel: ready to generate.
        """
        self.define(name, adapters, method, base_model=base_model, replace=replace, **hyperparameters)
        return self.load(name, device=device)

    def compositions(self) -> Sequence[CompositionRecord]:
        """Stored compositions, by name.

        Returns:
            Sequence[CompositionRecord]: with their members as the catalog knows them now.
        """
        with self.store.read() as session:
            return composition_queries.list_all(session)

    def composition(self, name: str) -> CompositionRecord:
        """A stored composition.

        Args:
            name (str): name it was stored under.

        Returns:
            CompositionRecord: with its members as the catalog knows them now.

        Raises:
            NotInCatalogError: no composition of that name.
        """
        with self.store.read() as session:
            return composition_queries.load(session, name)

    def delete_composition(self, name: str) -> None:
        """Forget a composition; its adapters stay.

        Args:
            name (str): name it was stored under.

        Raises:
            NotInCatalogError: no composition of that name.
        """
        with self.store.write() as session:
            composition_queries.delete(session, name)

    def load(self, name: str, *, device: str | None = None) -> RoutedModel:
        """The routed model of a stored composition.

        Args:
            name (str): name it was stored under.
            device (str | None): torch device; default CUDA where there is one, else CPU.

        Returns:
            RoutedModel: base model with the pool attached.

        Raises:
            NotInCatalogError: no composition of that name, or a member is no longer served.
        """
        return composing.load(self.store, name, device)

    def evaluate(
        self,
        name: str,
        methods: Sequence[str] | None = None,
        *,
        tasks: Sequence[str] | None = None,
        samples: int | None = None,
        unseen: bool = False,
        device: str | None = None,
    ) -> Comparison:
        """Exact-match accuracy per task of a composition's pool under several methods.

        A task is a member with test samples (``test.jsonl``). What all methods need and lack is said in one error
        before anything is loaded.

        Args:
            name (str): stored composition.
            methods (Sequence[str] | None): names, which run with their defaults (the composition's own with its
                stored hyperparameters), or ``METHOD:KEY=VALUE`` with others; ``own`` runs each task on its own adapter,
                ``all`` stands for every method that the pool allows. Default ``base own uniform`` and the
                composition's.
            tasks (Sequence[str] | None): score the tasks of these members alone.
            samples (int | None): at most this many samples per task.
            unseen (bool): also score each task with its own adapter left out of the pool.
            device (str | None): as for :meth:`load`.

        Returns:
            Comparison: rows by task, columns by method.

        Raises:
            NotInCatalogError: no composition of that name, or it has no such member.
            MethodError: a method is unknown, or the pool does not allow it.
        """
        return composing.evaluate(self.store, name, methods, tasks, samples, unseen, device, self.progress)

    def train(
        self,
        method: str,
        adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
        *,
        name: str | None = None,
        base_model: str | None = None,
        data: str | Path | None = None,
        columns: training.DataColumns | None = None,
        per_task: int | None = None,
        log: str | Path | None = None,
        device: str | None = None,
        dry_run: bool = False,
        restart: bool = False,
        **options: Any,
    ) -> TrainingSummary:
        """Train a method's gates over a pool; base model and adapters stay as they are.

        A run that was stopped goes on when the same call is made again. For training without a catalog see
        :func:`hub_router.training.fit`.

        Args:
            method (str): one that is trained, such as ``maple``.
            adapters (Mapping | Iterable): as for :meth:`define`;
                :func:`hub_router.hub.trainingpool.collection_pool` gives those of a collection.
            name (str | None): prototype set that gets the next version; default the method's name.
            base_model (str | None): base model; default the one that all adapters name.
            data (str | Path | None): JSONL of ``input``, ``output`` and ``adapter`` (name in the pool, or reference),
                or a dataset: a folder, a file such as CSV or parquet, ``owner/name`` on the Hub; default the catalog's
                samples of the adapters' tasks.
            columns (DataColumns | None): of a dataset; default ``input``, ``output``, and ``adapter`` or ``task``.
            per_task (int | None): at most this many examples of each task, the same choice every time.
            log (str | Path | None): file that gets a JSON line per step.
            device (str | None): as for :meth:`load`.
            dry_run (bool): check everything, but load no weights of the base model, and train nothing.
            restart (bool): forget a stopped run of the same name.
            **options (Any): settings of the training (``epochs``, ``learning_rate``, ...), of the method's training
                (``mask`` of MAPLE, ``balance`` of LoRA-Mixer, ...), and the method's hyperparameters.

        Returns:
            TrainingSummary: the set and its version, steps and losses.

        Raises:
            TrainingError: unusable data (names every bad line), a setting that there is not, a stopped run of other
                settings, or the same run going on elsewhere; nothing is trained.
            HubRouterError: the pool does not fit the base model or the method, or a dataset cannot be read.
        """
        return training.train(
            self.store,
            self.settings,
            method,
            name or method,
            adapters,
            base_model=base_model,
            data=training.TrainingData(data, columns, per_task),
            options=options,
            log=log,
            device=device,
            dry_run=dry_run,
            restart=restart,
            progress=self.progress,
        )

    def train_adapter(
        self,
        kind: str,
        out: str | Path,
        adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef] = (),
        *,
        base_model: str | None = None,
        data: str | Path | None = None,
        columns: training.DataColumns | None = None,
        per_task: int | None = None,
        log: str | Path | None = None,
        device: str | None = None,
        dry_run: bool = False,
        restart: bool = False,
        **options: Any,
    ) -> AdapterSummary:
        """Train adapters of PEFT on the data of many tasks; their folders can be synced, or loaded by PEFT.

        Args:
            kind (str): one adapter: ``shared``, a plain LoRA, or ``ewora``. Or several together: ``experts``, each on
                the examples of its name; ``lora-mixer`` or ``mixlora``, along with the method's gates.
            out (str | Path): the adapter's folder, or that of the adapters' folders and of ``gates.safetensors``; must
                not exist.
            adapters (Mapping | Iterable): whose samples are learned, as for :meth:`define`; several are trained on from
                where these are. There may be none, with data.
            base_model (str | None): base model; default the one that all adapters name.
            data (str | Path | None): as for :meth:`train`; which adapter an example is of need not be said.
            columns (DataColumns | None): as for :meth:`train`.
            per_task (int | None): as for :meth:`train`.
            log (str | Path | None): file that gets a JSON line per step.
            device (str | None): as for :meth:`load`.
            dry_run (bool): check everything, but load no weights of the base model, and train nothing.
            restart (bool): forget a stopped run into the same folder.
            **options (Any): settings of the training, and of PEFT's ``LoraConfig`` or of ``EworaConfig``; of several
                also those of the method and its training, ``preserve``, and of ``mixlora`` the number of ``experts``.

        Returns:
            AdapterSummary: the folder, steps and losses.

        Raises:
            TrainingError: unusable data, or a setting that there is not; nothing is trained.
        """
        several = kind in (EXPERTS, *JOINT_METHODS)
        return (train_experts if several else training.train_adapter)(
            self.store,
            kind,
            out,
            adapters,
            base_model=base_model,
            data=training.TrainingData(data, columns, per_task),
            options=options,
            log=log,
            device=device,
            dry_run=dry_run,
            restart=restart,
            progress=self.progress,
        )

    def report_pool(
        self, pool: str | Iterable[AdapterRef], *, epsilon: float | None = None, top_k: int | None = None
    ) -> PoolReport:
        """Calibrate HiLoRA's epsilon for a pool, and say how well its tasks' samples can be told apart.

        Args:
            pool (str | Iterable): a stored composition's name, or adapters of the catalog.
            epsilon (float | None): ridge for distances and bounds; default the calibrated one.
            top_k (int | None): k of the bounds, fewer than the adapters; default 3, or what the pool allows.

        Returns:
            PoolReport: calibration, distances, divergences and the bounds of HiLoRA's Theorems 1 and 2.

        Raises:
            NotInCatalogError: no such composition or adapter.
            HubRouterError: lists the adapters with too few embedded samples.
        """
        return reporting.report_pool(self.store, pool, epsilon, top_k)

    def _encoder_name(self, encoder: str | None) -> str | None:
        """The encoder asked for, else the one that the catalog is indexed with, else None (the default)."""
        from hub_router.search.index import indexed_encoder

        if encoder is not None:
            return encoder
        with self.store.read() as session:
            return indexed_encoder(session)


def _inspect(folder: Path) -> AdapterFacts:
    """Reads an adapter folder for ``sync``; torch is loaded with the first folder, not for a sync with nothing new."""
    from hub_router.lora.facts import inspect

    return inspect(folder)


def _filters(
    base_model: str | None, licence: str | None, rank: int | None, target: str | None, tag: str | None
) -> Filters:
    """What to look for; a copy's name and an old name of a base model also stand for its present id."""
    from hub_router.sync.base_names import canonical_id

    known_as = canonical_id(base_model) if base_model else None
    return Filters(base_model, licence, rank, target, tag, base_model_id=known_as)


def _fits(facts: AdapterFacts, model: str) -> str | None:
    """Holds an adapter against a base model for ``sync``, if the model's config is on this machine."""
    from hub_router.sync.at_hand import config_at_hand

    # Asked first, because what builds the architecture takes seconds to import.
    if not config_at_hand(model):
        return None
    from hub_router.composition.fit import fits_locally

    return fits_locally(facts, model)


def methods() -> Sequence[MethodInfo]:
    """Every routing method with its hyperparameters, in the registry's order."""
    from hub_router.routing.registry import describe_all

    return describe_all()


def database_status(home: str | Path | None = None, database_url: str | None = None) -> SchemaStatus:
    """Where the catalog's database stands; the arguments are those of :class:`Hub`. Changes nothing."""
    return schema.status(Settings.resolve(home, database_url).database_url)


def upgrade_database(home: str | Path | None = None, database_url: str | None = None) -> SchemaStatus:
    """Bring the catalog's database to this release's schema; the arguments are those of :class:`Hub`.

    Raises:
        SchemaError: the database is newer than this release, or another application's.
    """
    return schema.upgrade(Settings.resolve(home, database_url).database_url)
