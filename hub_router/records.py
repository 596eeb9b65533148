"""The frozen records that the catalog half and the engine half exchange.

Neither half imports the other: ``sync`` and ``search`` speak of adapters as :class:`AdapterRecord`, the engine reads
folders and reports :class:`AdapterFacts`, and ``hub_router.hub`` carries one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

UNKNOWN_LICENCE = "unknown"
# What an adapter of the catalog may be; only a ready one is served.
STATUSES = ("ready", "unsupported", "gated", "missing", "failed")


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module, as its tensors say.

    Args:
        name (str): module path in the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        rank (int): number of rank-one components.
        d_in (int): input width of the adapted linear map.
        d_out (int): output width of the adapted linear map.
        scaling (float): factor on B A (alpha/r, or alpha/sqrt(r) for rsLoRA).
        lookup (bool): the module is an embedding, ``d_in`` its vocabulary.
        dora (bool): the update scales the rows of the map as well (DoRA).
    """

    name: str
    rank: int
    d_in: int
    d_out: int
    scaling: float
    lookup: bool = False
    dora: bool = False


@dataclass(frozen=True)
class AdapterFacts:
    """What one adapter folder holds, read from its config and its tensors without loading a base model.

    Args:
        peft_type (str): adapter type, ``LORA`` for all that this release composes.
        base_model (str | None): ``base_model_name_or_path`` as written in the config.
        modules (tuple[ModuleFacts, ...]): every adapted module, in file order.
        dtypes (tuple[str, ...]): distinct tensor dtypes, e.g. ``("float32",)``.
        parameters (int): number of weights in the adapted modules.
        size_bytes (int): size of the weight files.
        weights_hash (str): sha256 over the weight files and the config fields that change the function.
        rslora (bool): whether scaling is alpha/sqrt(r).
        weight_files (tuple[str, ...]): weight files used, relative to the folder.
        notes (tuple[str, ...]): what a user should know, such as a module without direction (all-zero B).
        base_class (str | None): class of the base model that it was trained on, where the config names it.
        saved (Mapping[str, tuple[int, ...]]): shapes of the parameters saved beside the factors, by their paths in the
            base model; they take effect only where the adapter is used alone.
    """

    peft_type: str
    base_model: str | None
    modules: tuple[ModuleFacts, ...]
    dtypes: tuple[str, ...]
    parameters: int
    size_bytes: int
    weights_hash: str
    rslora: bool = False
    weight_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    base_class: str | None = None
    saved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules}))

    @property
    def targets(self) -> tuple[str, ...]:
        """Distinct last components of the module names, sorted."""
        return tuple(sorted({module.name.rsplit(".", 1)[-1] for module in self.modules}))


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one module's update s B A and its leading right singular vector.

    Args:
        module (str): module path in the base model.
        singular_values (np.ndarray): float32 ``(r,)``, descending.
        direction (np.ndarray | None): float32 ``(D_in,)``, unit length, sign free; None where B A is zero.
        ambiguous (bool): the two largest singular values coincide, so the direction is any unit vector of their plane.
    """

    module: str
    singular_values: np.ndarray
    direction: np.ndarray | None
    ambiguous: bool


# How sure a base model is, surest first.
CONFIDENCES = ("certain", "high", "medium", "low", "contradicted", "none")


@dataclass(frozen=True)
class BaseModel:
    """Which model an adapter was trained on, and why that is believed.

    Args:
        id (str | None): Hub id, or a folder of this machine; None where nothing names one.
        confidence (str): ``certain``: the user says so, or the tensors fit its architecture; ``high``: stated plainly
            and not disputed; ``medium``: derived by a rule, such as from a quantised copy to its original; ``low``:
            guessed, or disputed; ``contradicted``: the tensors cannot belong to it; ``none``: nothing is known.
        evidence (tuple[str, ...]): one fact a line.
        revision (str | None): commit of the base model, where a path into the Hub's cache names it.
    """

    id: str | None = None
    confidence: str = "none"
    evidence: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True)
class BaseChoice:
    """What the user says about base models.

    Args:
        kind (str): ``adapter`` or ``rule``.
        pattern (str): an adapter's reference; a rule's shell pattern for what adapters state.
        base_model (str): Hub id or folder.
        adapters (int): adapters in the catalog whose base model it decides.
    """

    kind: str
    pattern: str
    base_model: str
    adapters: int = 0


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter as the catalog knows it.

    Args:
        id (int): catalog id.
        source (str): ``hub`` or ``local``.
        repo_id (str): Hub repository id, or the absolute folder of a local adapter.
        revision (str): commit sha on the Hub; content hash of a local folder.
        subfolder (str): folder of the adapter inside the repository, empty for its top.
        path (Path): folder that holds adapter_config.json and the weights on this machine.
        status (str): ``ready``, or why the adapter is not served: ``unsupported gated missing failed``.
        reason (str): one line for every status but ``ready``.
        base_model (str | None): base model as written in the config.
        base_model_resolved (str | None): Hub id of the base model, or its folder, where known; see :class:`BaseModel`.
        licence (str): SPDX-like id of the card, ``unknown`` where it states none.
        peft_type (str): e.g. ``LORA``.
        ranks (tuple[int, ...]): distinct ranks.
        targets (tuple[str, ...]): distinct target names.
        dtypes (tuple[str, ...]): distinct tensor dtypes.
        modules (int): number of adapted modules.
        parameters (int): number of weights.
        size_bytes (int): size of the weight files.
        weights_hash (str): identity of the function that the adapter computes.
        tags (tuple[str, ...]): card tags.
        datasets (tuple[str, ...]): datasets named by the card.
        downloads (int | None): downloads as the Hub stated them at the last sync.
        likes (int | None): likes as the Hub stated them at the last sync.
        extra (Mapping[str, Any]): notes of the reader and other details for ``show``.
        base_model_confidence (str): how sure the base model is, see :class:`BaseModel`.
        base_model_evidence (tuple[str, ...]): why, one fact a line.
        base_model_revision (str | None): commit of the base model, where known.
    """

    id: int
    source: str
    repo_id: str
    revision: str
    subfolder: str
    path: Path
    status: str
    reason: str
    base_model: str | None
    base_model_resolved: str | None
    licence: str
    peft_type: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    dtypes: tuple[str, ...]
    modules: int
    parameters: int
    size_bytes: int
    weights_hash: str
    tags: tuple[str, ...]
    datasets: tuple[str, ...]
    downloads: int | None
    likes: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    base_model_confidence: str = "none"
    base_model_evidence: tuple[str, ...] = ()
    base_model_revision: str | None = None

    @property
    def ref(self) -> str:
        """The name a user types: ``repo_id`` or ``repo_id/subfolder``."""
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id

    @property
    def name(self) -> str:
        """Short name: the last component of :attr:`ref`."""
        return self.ref.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class RepoRecord:
    """A repository or folder that was synced and of which the catalog holds no adapter.

    Args:
        source (str): ``hub`` or ``local``.
        repo_id (str): Hub repository id, or the absolute folder.
        status (str): outcome of the last look: ``unsupported gated missing failed renamed``.
        reason (str): one line.
        renamed_to (str | None): present id of a renamed repository.
    """

    source: str
    repo_id: str
    status: str
    reason: str
    renamed_to: str | None = None


def bare_reason(status: str, reason: str) -> str:
    """A reason without the status that it may start with, for where the status stands beside it."""
    return reason.removeprefix(f"{status}:").strip()


def standing(status: str, reason: str) -> str:
    """Status and reason as one text that says nothing twice, such as ``gated: accept its licence``."""
    return ": ".join(part for part in (status, bare_reason(status, reason)) if part)


SAMPLE_SPLITS = ("sample", "test")
# Of one split of one adapter: at most this many that the user gave, as many that sync found, and as many shown.
SAMPLES_PER_SPLIT = 1_000
# Of what a user gives at once: so many are kept by default, and never fewer than HiLoRA compares.
SAMPLES_GIVEN = 200
SAMPLES_LEAST = 20


@dataclass(frozen=True)
class Sample:
    """One example of an adapter's task.

    Args:
        input (str): the prompt exactly as the model sees it.
        output (str): the expected answer.
        split (str): ``sample`` for routing and search, ``test`` for evaluation.
        origin (str): where it came from, e.g. ``samples.jsonl``.
        given (bool): whether the user added it, so that it stays when the repository brings other samples.
    """

    input: str
    output: str
    split: str = "sample"
    origin: str = "samples.jsonl"
    given: bool = False


@dataclass(frozen=True)
class FileFacts:
    """One file of a catalogued adapter.

    Args:
        path (str): relative to the repository's top.
        size_bytes (int): size as verified.
        sha256 (str): content hash as verified.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class AdapterDetails:
    """Everything that the catalog knows of one adapter, for ``show``.

    Args:
        record (AdapterRecord): the adapter.
        card_text (str): prose of its card.
        files (tuple[FileFacts, ...]): verified files.
        samples (tuple[Sample, ...]): stored examples of both splits.
        spectra (Mapping[str, Spectrum]): by module; empty before ``index``.
        embeddings (Mapping[str, int]): number of embedded texts by encoder.
    """

    record: AdapterRecord
    card_text: str
    files: tuple[FileFacts, ...]
    samples: tuple[Sample, ...]
    spectra: Mapping[str, Spectrum]
    embeddings: Mapping[str, int]


@dataclass(frozen=True)
class CompositionMemberRecord:
    """One adapter of a composition.

    Args:
        name (str): the user's name for it; its place in the tuple is its place on axis E.
        adapter (AdapterRecord): the adapter as the catalog knows it now.
        weights_hash (str): identity of the weights it was composed with.
    """

    name: str
    adapter: AdapterRecord
    weights_hash: str


@dataclass(frozen=True)
class CompositionRecord:
    """A routed model's recipe, stored under a name.

    Args:
        name (str): unique name.
        base_model (str): Hub id or folder of the base model.
        method (str): routing method, a name of ``hub-router methods``.
        hyperparameters (Mapping[str, Any]): the method's settings that differ from its defaults.
        members (tuple[CompositionMemberRecord, ...]): the pool, in the order of axis E.
    """

    name: str
    base_model: str
    method: str
    hyperparameters: Mapping[str, Any]
    members: tuple[CompositionMemberRecord, ...]


@dataclass(frozen=True)
class ModuleFit:
    """One module of one adapter, held against a base model.

    Args:
        module (str): module path in the base model.
        verdict (str): ``fits``; ``absent``: no such module; ``shape``: other widths; ``kind``: no linear map that can
            be adapted; ``bypassed``: the model reads its weight without calling it; for a parameter saved beside the
            factors also ``no head``: the model has no such task head, so it is left out.
        rank (int | None): rank of the update; None for a saved parameter.
        got (str): widths of the update, ``D_in x D_out``, or the saved parameter's shape.
        expected (str): those of the model's module, empty where it has none.
        reason (str): one line, empty where it fits.
    """

    module: str
    verdict: str
    rank: int | None
    got: str
    expected: str = ""
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether the module can be adapted as the adapter says, or is left out without harm."""
        return self.verdict in ("fits", "no head")


@dataclass(frozen=True)
class AdapterCheck:
    """One adapter, read and held against a base model, with nothing loaded.

    Args:
        ref (str): catalog reference or folder.
        reason (str): why it cannot be used; empty where it can.
        notes (tuple[str, ...]): what a user should know about it.
        base_model (str | None): what it was held against; None where it was only read.
        modules (tuple[ModuleFit, ...]): every module and saved parameter; empty where it was only read.
        facts (AdapterFacts | None): what it holds; None where it cannot be read.
    """

    ref: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    base_model: str | None = None
    modules: tuple[ModuleFit, ...] = ()
    facts: AdapterFacts | None = None

    @property
    def verdict(self) -> str:
        """``usable``, ``usable with note``, ``does not fit`` or ``unsupported``."""
        if self.reason:
            return "unsupported"
        if not all(fit.fits for fit in self.modules):
            return "does not fit"
        return "usable with note" if self.notes else "usable"


# What adapters are ranked by: the cosine of their nearest text, or how likely an input is among their samples.
SEARCH_BY = ("cosine", "likelihood")


@dataclass(frozen=True)
class IndexSummary:
    """What one call of ``index`` did.

    Args:
        spectra (int): adapters whose spectra were computed.
        embedded (int): adapters whose texts were embedded.
        gaussians (int): adapters to whose embedded samples a Gaussian was fitted.
        unchanged (int): adapters for which nothing was missing.
        encoder (str): sentence encoder used.
        failed (tuple[tuple[str, str], ...]): (adapter, reason) of those that could not be indexed.
    """

    spectra: int
    embedded: int
    gaussians: int
    unchanged: int
    encoder: str
    failed: tuple[tuple[str, str], ...] = ()
