"""Examples of the adapters' tasks: what sync found, and what the user gives beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from hub_router.errors import SamplesError
from hub_router.progress import Progress
from hub_router.records import SAMPLE_SPLITS, SAMPLES_GIVEN, AdapterRecord, Sample
from hub_router.store import adapters as adapter_queries
from hub_router.store import samples as sample_queries
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.sync.samples import Reading


@dataclass(frozen=True)
class AddedSamples:
    """What one call added.

    Args:
        adapter (str): the adapter's reference.
        split (str): ``sample`` or ``test``.
        origin (str): as stored, and as :meth:`Samples.remove` takes it.
        added (int): samples that are new.
        known (int): samples left out because the user gave one with the same input before.
        replaced (int): given samples of the same origin that are gone.
        left_out (int): samples left out for the limit.
        unusable (int): rows of a dataset that give no sample.
        reason (str): why the first of them gives none.
    """

    adapter: str
    split: str
    origin: str
    added: int
    known: int
    replaced: int
    left_out: int
    unusable: int
    reason: str


@dataclass(frozen=True)
class Samples:
    """The samples of a catalog's adapters; :attr:`hub_router.hub.Hub.samples` gives one.

    What is added here comes before what sync finds, and stays through every sync until it is removed. ``hub.index()``
    embeds it.

    Args:
        store (Store): catalog.
        progress (Progress): where long work reports.
    """

    store: Store
    progress: Progress

    def list(self, ref: AdapterRef, split: str | None = None) -> Sequence[Sample]:
        """Samples of an adapter: those that the user gave, then those that sync found, each input once per split.

        Args:
            ref (AdapterRef): as for :meth:`hub_router.hub.Hub.show`, or a record.
            split (str | None): ``sample`` or ``test``; default both.

        Returns:
            Sequence[Sample]: at most 1000 per split.

        Raises:
            NotInCatalogError: no such adapter.
        """
        with self.store.read() as session:
            record = _find(session, ref)
            return sample_queries.samples(session, record.id, split)

    def add(
        self,
        ref: AdapterRef,
        file: str | Path,
        *,
        split: str = "sample",
        input_field: str = "input",
        output_field: str | None = None,
        limit: int = SAMPLES_GIVEN,
        replace: bool = False,
    ) -> AddedSamples:
        """Add the samples of a JSON lines file, all or none.

        Of a file with more than ``limit`` samples those are kept whose inputs have the smallest sha256: a choice that
        is the same every time, and spread over the whole file.

        Args:
            ref (AdapterRef): as for :meth:`list`.
            file (str | Path): one object per line, ``{"input": text, "output": text}``.
            split (str): ``sample`` for routing and search, ``test`` for evaluation.
            input_field (str): name of the field with the input.
            output_field (str | None): name of the field with the output, which every line then needs; default
                ``output``, which may be absent from routing samples.
            limit (int): at most this many, 20 to 1000.
            replace (bool): put them in place of those added from a file of this name to this split before.

        Returns:
            AddedSamples: what became of them.

        Raises:
            NotInCatalogError: no such adapter.
            SamplesError: the file cannot be used; names every line that is no sample.
        """
        from hub_router.sync.samples import Fields, read_sample_file

        fields = Fields(input_field, output_field or "output", output_field is not None or split == "test")
        self._check(ref, split)
        return self._add(ref, read_sample_file(Path(file), split, limit, fields), replace)

    def add_dataset(
        self,
        ref: AdapterRef,
        name: str,
        *,
        column: str,
        output_column: str | None = None,
        config: str | None = None,
        dataset_split: str = "train",
        split: str = "sample",
        limit: int = SAMPLES_GIVEN,
        replace: bool = False,
    ) -> AddedSamples:
        """Add samples from the columns of a dataset; needs the extra ``datasets``.

        All rows of the dataset's split are read, nothing of a dataset on the Hub is kept on disk, and no code of it
        runs. The choice among them is that of :meth:`add`.

        Args:
            ref (AdapterRef): as for :meth:`list`.
            name (str): ``owner/name`` on the Hub, a folder, or a file (csv, tsv, json, jsonl, parquet).
            column (str): column with the inputs.
            output_column (str | None): column with the outputs, text or numbers; classes give their names.
            config (str | None): the dataset's configuration, where it has several.
            dataset_split (str): the dataset's own split.
            split (str): as for :meth:`add`.
            limit (int): as for :meth:`add`.
            replace (bool): put them in place of those added from this column to this split before.

        Returns:
            AddedSamples: what became of them; rows that give no sample are counted.

        Raises:
            NotInCatalogError: no such adapter.
            SamplesError: the extra is missing, or the dataset cannot be used.
        """
        from hub_router.sync.dataset import Columns, read_dataset

        columns = Columns(name, column, output_column, config, dataset_split)
        self._check(ref, split)
        return self._add(ref, read_dataset(columns, split, limit, self.progress), replace)

    def remove(self, ref: AdapterRef, origin: str) -> int:
        """Remove samples that were added here; what sync found stays, and shows again where they stood before it.

        Args:
            ref (AdapterRef): as for :meth:`list`.
            origin (str): as :meth:`list` gives it, such as ``file mine.jsonl``.

        Returns:
            int: how many there were.

        Raises:
            NotInCatalogError: no such adapter.
            SamplesError: none of that origin was given; names the origins that were.
        """
        with self.store.write() as session:
            record = _find(session, ref)
            return sample_queries.remove_given(session, record.id, origin)

    def _check(self, ref: AdapterRef, split: str) -> None:
        """Refuse what is known to be wrong before anything long is read."""
        if split not in SAMPLE_SPLITS:
            raise SamplesError(f"split is {split!r}, expected one of: {', '.join(SAMPLE_SPLITS)}")
        with self.store.read() as session:
            _find(session, ref)

    def _add(self, ref: AdapterRef, reading: Reading, replace: bool) -> AddedSamples:
        first = reading.samples[0]
        with self.store.write() as session:
            # Not the row found before reading: a sync may have brought a new revision since.
            record = _find(session, ref)
            done = sample_queries.add_given(session, record.id, reading.samples, replace_origin=replace)
        return AddedSamples(
            adapter=record.ref,
            split=first.split,
            origin=first.origin,
            added=done.added,
            known=done.known,
            replaced=done.replaced,
            left_out=reading.left_out,
            unusable=reading.unusable,
            reason=reading.reason,
        )


def _find(session: Session, ref: AdapterRef) -> AdapterRecord:
    return ref if isinstance(ref, AdapterRecord) else adapter_queries.find(session, str(ref))
