"""Experts that are trained together, with their gates or by the labels of their tasks, and become adapters again."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hub_router.composition.assemble import make_updates, prepare
from hub_router.composition.attach import attach, detach, need_unrouted, routed_updates
from hub_router.composition.base_model import base_id, base_name
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.outer import check_outer, widths_of
from hub_router.composition.pool import check_pool, read_pool
from hub_router.composition.text import has_encoder, pad_token
from hub_router.composition.trained import vectors_of_updates
from hub_router.errors import TrainingError
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.bank import build_bank
from hub_router.lora.folder import write_adapter
from hub_router.lora.reader import read_adapter
from hub_router.progress import SILENT, Progress
from hub_router.prototypes import PrototypeMember, Prototypes, write_prototypes
from hub_router.routing.base import Gates, Router
from hub_router.routing.registry import create
from hub_router.training.balance import Spread
from hub_router.training.data import Example, check_examples, data_hash
from hub_router.training.fit import base_fingerprint, checkpointing, encoded_parts, finish
from hub_router.training.gating import Decision, ModuleState, Reading, Trainable, training
from hub_router.training.loop import Loop, Outcome
from hub_router.training.peft_adapter import InPlace, TaskLoss, need_new, whole_folder, with_adapter
from hub_router.training.recipe import Objective, Phase
from hub_router.training.registry import create_recipe
from hub_router.training.settings import TrainingSettings

# Of LoRA-Mixer's first stage (A.6).
SETTINGS = TrainingSettings(learning_rate=1e-5, batch_size=4, accumulation=4, warmup=0.1, schedule="cosine")
PRESERVE = 5e-5
GATES_FILE = "gates.safetensors"
HARD, MIXER = "experts", "lora-mixer"


@dataclass(frozen=True, eq=False)
class Experts:
    """What a run made.

    Args:
        folders (Mapping[str, Path]): the adapters, by their names.
        prototypes (Path | None): file with the gates, which ``compose(prototypes=FILE)`` takes; None where the labels
            of the tasks gated.
        loss (float): mean of the answer tokens' loss over the last tenth of the steps, nats.
        validation (float | None): loss on the examples that were set aside.
        steps (int): optimizer steps.
    """

    folders: Mapping[str, Path]
    prototypes: Path | None
    loss: float
    validation: float | None
    steps: int


def fresh_experts(model: Any, names: Sequence[str], config: Any, seed: int = 0) -> tuple[LoraAdapter, ...]:
    """New LoRA adapters as PEFT starts them, A random and B zero.

    Args:
        model (PreTrainedModel): the base model; left as it was.
        names (Sequence[str]): of the adapters.
        config (peft.LoraConfig): of each.
        seed (int): of the first; each one has the next.

    Returns:
        tuple[LoraAdapter, ...]: in the order of the names.

    Raises:
        TrainingError: PEFT cannot put such an adapter on the model, or the config asks for dropout.
    """
    if getattr(config, "lora_dropout", 0):
        raise TrainingError(f"adapters are trained together without dropout, got lora_dropout={config.lora_dropout}")
    found = []
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(names):
            with with_adapter(model, config, seed + place) as adapted:
                adapted.save_pretrained(Path(folder) / str(place), save_embedding_layers=False)
            found.append(read_adapter(Path(folder) / str(place), name))
        # In memory of their own: their files are about to go.
        return tuple(replace(copy.deepcopy(each), path=None) for each in found)


def fit_experts(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    experts: Mapping[str, Any] | Sequence[Any],
    method: str,
    *,
    settings: TrainingSettings | None = None,
    preserve: float | None = None,
    out: str | Path,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Experts:
    """Train adapters together; the base model is left as it was, and so are the adapters that they start from.

    ``experts``: each adapter reads the examples of its own name alone, all of them in one run (`LoRA-Mixer`_, hard
    routing of stage 1). ``lora-mixer``: all adapters with their router, by task loss, balance loss and ``preserve``
    times the squared distance from where they began (Eq. 12). ``mixlora``: the experts of feed-forward blocks with
    their router (`MixLoRA`_).

    .. _LoRA-Mixer: https://arxiv.org/abs/2507.00029
    .. _MixLoRA: https://arxiv.org/abs/2404.15159

    Args:
        model (PreTrainedModel): the base model, of any dtype; the adapters are in float32 or wider.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        examples (Sequence[Example]): of all tasks; ``adapter`` says which task one is of.
        experts (Mapping | Sequence): what to start from: folders of plain LoRA adapters, or :func:`fresh_experts`.
        method (str): see above.
        settings (TrainingSettings | None): of the loop; None takes the paper's.
        preserve (float | None): beta of LoRA-Mixer; None takes the paper's, 0 for other methods.
        out (str | Path): folder that gets a folder per adapter, and ``gates.safetensors``; must not exist.
        checkpoint (str | Path | None): folder for checkpoints, from which a stopped run goes on; removed at the end.
        log (str | Path | None): file that gets a JSON line per step.
        progress (Progress): told of every step.
        **options (Any): the recipe's, such as ``balance="none"``, and the method's, such as ``top_k``.

    Returns:
        Experts: the adapters, and their gates.

    Raises:
        TrainingError: another method, an invalid option, unusable examples, adapters that are more than plain LoRA, a
            folder that exists, or a checkpoint of another run.
        HubRouterError: the adapters do not fit the model, or the method.
    """
    folder, kept = Path(out).expanduser(), None if checkpoint is None else Path(checkpoint)
    need_new(folder)
    plan = _plan(method, options, settings, preserve)
    pool, unreadable = read_pool(experts)
    tasks = list(dict.fromkeys(each.adapter for each in examples))
    names = [each.name for each in pool] if method == HARD else tasks
    check_examples(examples, names, labelled=method == HARD)
    encoded, aside = encoded_parts(model, tokenizer, examples, names, plan.settings)
    reading = Reading()
    with (
        torch.enable_grad(),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        _routed(model, plan.router, pool, unreadable) as factors,
        training(model, plan.rule, reading) as gates,
        checkpointing(model, plan.settings),
    ):
        leaves: dict[str, Trainable] = {
            f"{name} {letter}": InPlace(leaf)
            for name, each in factors.items()
            for letter, leaf in (("A", each.down), ("B", each.up))
        }
        run = Loop(
            model=model,
            gates={**leaves, **({} if method == HARD else gates)},
            recipe=cast(Objective, _Joint(plan.objective, list(factors.values()), plan.preserve)),
            phases=(Phase(method, tuple(range(len(pool))), tuple(range(len(names)))),),
            settings=plan.settings,
            reading=reading,
            pad=pad_token(model, tokenizer),
            fingerprint=_fingerprint(model, plan, pool, examples, kept is not None),
            checkpoint=kept,
            log=None if log is None else Path(log),
        )
        outcome = run.go(encoded, aside, progress)
        vectors = vectors_of_updates((update for _, update in routed_updates(model)), [each.name for each in pool])
        made = _adapters(pool, factors)
    base = base_id(model)
    with whole_folder(folder) as draft:
        for each in made:
            write_adapter(draft / each.name, each, base, "SEQ_2_SEQ_LM" if has_encoder(model) else "CAUSAL_LM")
        if method != HARD:
            _write_gates(draft, made, vectors, plan, base, outcome, examples)
    if kept is not None:
        finish(model, kept)
    folders = {each.name: folder / each.name for each in made}
    gates_file = None if method == HARD else folder / GATES_FILE
    return Experts(folders, gates_file, outcome.loss, outcome.validation, outcome.steps)


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a run gates and what it is trained by."""

    router: Router
    rule: Any
    objective: Objective
    settings: TrainingSettings
    preserve: float
    described: str


def _plan(method: str, options: Mapping[str, Any], settings: TrainingSettings | None, preserve: float | None) -> _Plan:
    if method not in (HARD, MIXER, "mixlora"):
        raise TrainingError(f"method {method!r} trains no adapters; methods that do: {HARD}, {MIXER}, mixlora")
    beta = (PRESERVE if method == MIXER else 0.0) if preserve is None else preserve
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 <= beta < float("inf"):
        raise TrainingError(f"preserve={beta!r}, expected a finite number from 0")
    if method == HARD:
        if options:
            raise TrainingError(f"{HARD} are trained without options {', '.join(options)}")
        return _Plan(create(MIXER, {}), _hard, cast(Objective, TaskLoss(HARD)), settings or SETTINGS, beta, HARD)
    shape = {key: value for key, value in options.items() if key in ("top_k",)}
    recipe = create_recipe(method, {key: value for key, value in options.items() if key not in shape})
    router = create(method, shape)
    return _Plan(
        router, partial(recipe.gate, router), recipe, settings or recipe.settings, beta, repr((router, recipe))
    )


def _hard(state: ModuleState, x: torch.Tensor) -> Decision:
    """Hard routing: all weight to the adapter of the token's own task."""
    return Decision(Gates((state.experts == state.own).to(torch.float32)))  # [..., C]


@dataclass(eq=False)
class _Factors:
    """The factors of one module as they are trained, B without its scaling, as PEFT trains it."""

    update: RoutedUpdate
    down: torch.Tensor  # [R, D_in]
    up: torch.Tensor  # [R, D_out]
    scales: torch.Tensor  # [R, 1]

    def __post_init__(self) -> None:
        self.start = self.down.clone(), self.up.clone()
        self.down.requires_grad_()
        self.up.requires_grad_()

    def use(self, *_ignored: Any) -> None:
        """Pre-hook of the linear map: its update multiplies with what is trained."""
        buffers, dtype = self.update._buffers, self.update.A.dtype
        buffers["A"], buffers["Bt"] = self.down.to(dtype), (self.up * self.scales).to(dtype)

    def moved(self) -> torch.Tensor:
        """Squared distance from the start, scalar."""
        return (self.down - self.start[0]).square().sum() + (self.up - self.start[1]).square().sum()


@dataclass(frozen=True, eq=False)
class _Joint:
    """A recipe's objective, and what the adapters pay for leaving their start (LoRA-Mixer, Eq. 12)."""

    inner: Objective
    factors: Sequence[_Factors]
    preserve: float

    @property
    def name(self) -> str:
        """See :class:`~hub_router.training.recipe.Objective`."""
        return self.inner.name

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`."""
        beside = self.inner.balance(spreads, done)
        if not self.preserve:
            return beside
        kept = self.preserve * torch.stack([each.moved() for each in self.factors]).sum()
        return kept if beside is None else beside + kept


@contextmanager
def _routed(
    model: nn.Module, router: Router, pool: Sequence[LoraAdapter], unreadable: Sequence[str]
) -> Iterator[dict[str, _Factors]]:
    """The model with the pool attached, whose factors take gradients; detached afterwards."""
    need_unrouted(model)
    check_pool(model, base_name(model), pool, unreadable, [each.name for each in pool])
    more = [each.name for each in pool if each.saved or any(_is_more(part) for part in each.modules.values())]
    if more:
        raise TrainingError(f"only plain LoRA of linear maps is trained, and these are more: {', '.join(more)}")
    # With B = 0, too, as new adapters have it.
    bank = build_bank(pool)
    router.check(bank)
    check_outer(model, router, bank)
    prepared = prepare(router, bank, PoolFeatures(widths=widths_of(model, router, bank.modules)))
    updates = make_updates(model, router, prepared, len(pool))
    attach(model, updates)
    try:
        found = {}
        for name, update in updates.items():
            parts = [each.modules[name] for each in pool if name in each.modules]
            scales = [torch.full((part.rank, 1), part.scaling) for part in parts]
            # As adapters have them, not rounded to the base model's precision.
            wide = torch.promote_types(update.A.dtype, torch.float32)
            stacked = ([part.A for part in parts], [part.B.mT for part in parts], scales)
            found[name] = _Factors(update, *(torch.cat(each).to(update.A.device, wide) for each in stacked))
            update.handles.append(model.get_submodule(name).register_forward_pre_hook(found[name].use))
        yield found
    finally:
        detach(model)


def _is_more(factors: LoraFactors) -> bool:
    return factors.lookup or len(factors.tensors) > 2


def _adapters(pool: Sequence[LoraAdapter], factors: Mapping[str, _Factors]) -> list[LoraAdapter]:
    """The pool with the factors that were trained."""
    modules: dict[str, dict[str, LoraFactors]] = {each.name: {} for each in pool}
    for name, trained in factors.items():
        start = 0
        for adapter in pool:
            if (part := adapter.modules.get(name)) is not None:
                rows = slice(start, start + part.rank)
                A, B = trained.down.detach()[rows].clone(), trained.up.detach()[rows].mT.clone()
                modules[adapter.name][name] = LoraFactors(A, B, part.scaling)
                start += part.rank
    return [LoraAdapter(each.name, None, each.base_model, modules[each.name], "") for each in pool]


def _write_gates(
    draft: Path,
    made: Sequence[LoraAdapter],
    vectors: Mapping[str, Mapping[str, Any]],
    plan: _Plan,
    base: str,
    outcome: Outcome,
    examples: Sequence[Example],
) -> None:
    """The gates of adapters that lie in a folder, as a prototype set beside them."""
    hashes = {each.name: read_adapter(draft / each.name, each.name).weights_hash for each in made}
    prototypes = Prototypes(
        method=plan.router.name,
        base_model=base,
        members=tuple(PrototypeMember(name, hashes[name], vectors[name]) for name in hashes),
        parent="",
        hyperparameters={"recipe": plan.described, "preserve": plan.preserve, **plan.settings.to_json()},
        metrics={"loss": outcome.loss, "validation_loss": outcome.validation, "steps": outcome.steps},
        data_hash=data_hash(examples),
        seed=plan.settings.seed,
    )
    write_prototypes(draft / GATES_FILE, prototypes)


def _fingerprint(
    model: Any, plan: _Plan, pool: Sequence[LoraAdapter], examples: Sequence[Example], stored: bool
) -> dict[str, Any]:
    """What the adapters depend on."""
    start = hashlib.sha256()
    for adapter in pool:
        for name, each in adapter.modules.items():
            start.update(f"{adapter.name} {name} {each.scaling}".encode())
            for tensor in (each.A, each.B):
                start.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return {
        **base_fingerprint(model, stored),
        "training": plan.described,
        "preserve": plan.preserve,
        "settings": plan.settings.decisive,
        "data": data_hash(examples),
        "start": start.hexdigest(),
    }
