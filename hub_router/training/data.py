"""Training data: examples of the adapters' tasks, as text and as tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hub_router.errors import TrainingError
from hub_router.records import Sample

if TYPE_CHECKING:
    from hub_router.training.recipe import Recipe

_LOG = logging.getLogger(__name__)
# Faulty lines named in one error; the rest are counted.
_NAMED = 50
_STRANGER = "is not in the pool"
_NO_ADAPTER = "no adapter"
# Methods that are trained on examples of any task: which adapter they name only balances what is drawn.
_UNLABELLED = frozenset({"lora-mixer", "lorahub", "mixlora", "mole", "xlora"})


@dataclass(frozen=True)
class Example:
    """One input and the answer that is to be learned.

    Args:
        adapter (str): name in the pool of the adapter that was trained on this task; empty where that is not known,
            which not every method minds (see :func:`needs_labels`).
        input (str): prompt exactly as the model is to see it.
        output (str): its answer; a space goes in between where neither side brings white space.
    """

    adapter: str
    input: str
    output: str


@dataclass(frozen=True)
class Encoded:
    """An example in tokens.

    Args:
        adapter (int): position in the pool; -1 where the task is not known.
        prompt (tuple[int, ...]): tokens that are read.
        answer (tuple[int, ...]): tokens that are learned, the end token among them.
    """

    adapter: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def from_samples(samples: Mapping[str, Iterable[Sample]]) -> list[Example]:
    """Examples from the catalog's samples.

    Args:
        samples (Mapping[str, Iterable[Sample]]): by adapter; those without an output are no examples.

    Returns:
        list[Example]: in their order.
    """
    return [
        Example(adapter, each.input, each.output)
        for adapter, given in samples.items()
        for each in given
        if each.output.strip()
    ]


def needs_labels(recipe: Recipe) -> bool:
    """Whether a recipe has to know which adapter was trained on an example's task.

    Those that do not, draw from all examples of unknown task as if they were of one.

    Args:
        recipe (Recipe): of a method.

    Returns:
        bool: True for those that mask the adapter, or train it on its own task alone.
    """
    return getattr(recipe, "mask", "") != "none" and recipe.name not in _UNLABELLED


def read_jsonl(
    path: Path, adapters: Sequence[str] | Mapping[str, str] | None, *, labelled: bool = True
) -> list[Example]:
    """Read examples, all or none.

    Args:
        path (Path): a JSON object per line: ``input``, ``output``, and ``adapter`` or ``task``, a name of the pool.
        adapters (Sequence[str] | Mapping[str, str] | None): names of the pool, or what its adapters may be called and
            their names in the pool; None where there is no pool, and a task may have any name.
        labelled (bool): whether every line must name an adapter.

    Returns:
        list[Example]: in the file's order; blank lines are passed over.

    Raises:
        TrainingError: the file cannot be read, or holds no example; or lists every line that is none.
    """
    try:
        # Not splitlines(), which also splits at characters that JSON allows inside a text, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"training data {path} cannot be read: {error}") from error
    examples, faults = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _parsed(line, adapters, labelled)
        if isinstance(found, Example):
            examples.append(found)
        else:
            faults[number] = found
    refuse_faults(str(path), "line", faults, adapters)
    if not examples:
        raise TrainingError(
            f'{path} holds no examples, expected {{"input": ..., "output": ..., "adapter": ...}} per line'
        )
    return examples


def example_of(
    entry: Mapping[str, Any], adapters: Sequence[str] | Mapping[str, str] | None, *, labelled: bool = True
) -> Example | str:
    """An example of ``input``, ``output`` and ``adapter`` or ``task``.

    Args:
        entry (Mapping[str, Any]): of a line or row.
        adapters (Sequence[str] | Mapping[str, str] | None): as for :func:`read_jsonl`.
        labelled (bool): as for :func:`read_jsonl`.

    Returns:
        Example | str: or what is wrong.
    """
    wrong = [key for key in ("input", "output") if not isinstance(entry.get(key), str) or not entry[key].strip()]
    if wrong:
        return f"{' and '.join(wrong)} missing, empty or no text"
    if not _is_unicode(entry["input"] + entry["output"]):
        return "half a surrogate pair, which is no text"
    adapter = entry.get("task") if entry.get("adapter") is None else entry["adapter"]
    if adapters is None:
        return Example(str(adapter or "task"), entry["input"], entry["output"])
    if adapter is None:
        return f"{_NO_ADAPTER} named" if labelled else Example("", entry["input"], entry["output"])
    if not isinstance(adapter, str) or adapter not in adapters:
        return f"adapter {adapter!r} {_STRANGER}"
    name = adapters[adapter] if isinstance(adapters, Mapping) else adapter
    return Example(name, entry["input"], entry["output"])


def refuse_faults(
    source: str, what: str, faults: Mapping[int, str], adapters: Sequence[str] | Mapping[str, str] | None
) -> None:
    """Refuse data with lines that are no examples.

    Args:
        source (str): file or dataset.
        what (str): what is numbered: ``line`` or ``row``.
        faults (Mapping[int, str]): what is wrong, by number.
        adapters (Sequence[str] | Mapping[str, str] | None): as for :func:`read_jsonl`; named once, if they matter.

    Raises:
        TrainingError: there are faults; lists them.
    """
    if not faults:
        return
    lines = [f"  {what} {number}: {fault}" for number, fault in list(faults.items())[:_NAMED]]
    if len(faults) > _NAMED:
        lines.append(f"  and {len(faults) - _NAMED} more")
    if adapters is not None and any(_STRANGER in fault or _NO_ADAPTER in fault for fault in faults.values()):
        names = list(dict.fromkeys(adapters.values() if isinstance(adapters, Mapping) else adapters))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"the pool's adapters: {', '.join(names[:_NAMED])}{more}")
    raise TrainingError("\n".join([f"{source}: {len(faults)} {what}s are no examples:", *lines]))


def check_examples(examples: Sequence[Example], adapters: Sequence[str], *, labelled: bool = True) -> None:
    """Refuse data that says nothing about this pool.

    Args:
        examples (Sequence[Example]): the data.
        adapters (Sequence[str]): names of the pool.
        labelled (bool): whether every example must name an adapter.

    Raises:
        TrainingError: there is none, or it names adapters that are not in the pool (lists all of them).
    """
    if not examples:
        raise TrainingError("there are no training examples; give --data FILE, or hub-router samples add")
    odd = [number for number, each in enumerate(examples) if not _is_example(each)]
    if odd:
        shown = ", ".join(map(str, odd[:_NAMED]))
        raise TrainingError(f"examples must be Example(adapter, input, output) of three texts; these are none: {shown}")
    broken = [number for number, each in enumerate(examples) if not _is_unicode(each.input + each.output)]
    if broken:
        raise TrainingError(f"examples hold half a surrogate pair, which is no text: {', '.join(map(str, broken))}")
    strangers = sorted({each.adapter for each in examples} - {*adapters, *(() if labelled else ("",))})
    if strangers:
        named = ", ".join(each or "none at all" for each in strangers)
        raise TrainingError(
            f"training data names adapters that are not in the pool: {named}; its adapters: {', '.join(adapters)}"
        )


def data_hash(examples: Sequence[Example]) -> str:
    """Fingerprint of training data.

    Args:
        examples (Sequence[Example]): in order.

    Returns:
        str: sha256, hexadecimal.
    """
    digest = hashlib.sha256()
    for each in examples:
        digest.update(json.dumps([each.adapter, each.input, each.output]).encode())
    return digest.hexdigest()


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Set a part of every adapter's examples aside.

    Args:
        examples (Sequence[Example]): the data.
        share (float): of each adapter's examples, at least 0, below 1; at least one stays in training.
        seed (int): of the choice.

    Returns:
        tuple[list[Example], list[Example]]: for training, and for validation.
    """
    train: list[Example] = []
    held: list[Example] = []
    for adapter in dict.fromkeys(each.adapter for each in examples):
        own = [each for each in examples if each.adapter == adapter]
        order = np.random.default_rng((seed, len(own))).permutation(len(own))
        count = min(round(share * len(own)), len(own) - 1)
        held += [own[place] for place in sorted(order[:count])]
        train += [own[place] for place in sorted(order[count:])]
    if share and examples and not held:
        raise TrainingError(f"validation={share} sets none of {len(examples)} examples aside; raise it")
    return train, held


def encode(
    examples: Sequence[Example], adapters: Sequence[str], tokenizer: Any, longest: int | None, encoder: bool
) -> list[Encoded]:
    """Tokenize examples.

    Args:
        examples (Sequence[Example]): the data.
        adapters (Sequence[str]): names of the pool.
        tokenizer (PreTrainedTokenizerBase): of the base model.
        longest (int | None): most tokens of an example; a longer prompt loses its beginning, and its answer nothing.
        encoder (bool): whether the model reads the prompt in an encoder, and the answer is a text of its own.

    Returns:
        list[Encoded]: in order.

    Raises:
        TrainingError: an answer has no tokens, or leaves no room for its prompt; counts them and shows the first.
    """
    place = {"": -1} | {name: number for number, name in enumerate(adapters)}
    answers = [each.output if encoder else _joined(each.input, each.output) for each in examples]
    prompts = tokenizer([each.input for each in examples])["input_ids"]
    learned = tokenizer(answers, add_special_tokens=False)["input_ids"]
    if not encoder:
        learned = _continued(examples, answers, prompts, learned, tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded, wrong, cut = [], [], 0
    for each, prompt, answer in zip(examples, prompts, learned, strict=True):
        room = None if longest is None else longest - (0 if encoder else len(answer) + len(end))
        long = longest is not None and len(answer) + len(end) > longest
        if not answer or not prompt or long or (room is not None and room < 1):
            wrong.append(each)
            continue
        kept = prompt
        if room is not None and len(prompt) > room:
            # A start token stays where it is.
            first = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
            kept, cut = [*first, *prompt[len(prompt) - room + len(first) :]], cut + 1
        encoded.append(Encoded(place[each.adapter], tuple(kept), (*answer, *end)))
    if cut:
        _LOG.warning("%d prompts are longer than the model's %d positions and lose their beginning", cut, longest)
    if wrong:
        raise TrainingError(
            f"{len(wrong)} examples have no tokens in prompt or answer, or an answer longer than the model's "
            f"{longest} positions; the first is of adapter {wrong[0].adapter!r}: {wrong[0].input[:80]!r}"
        )
    return encoded


def _is_example(each: Any) -> bool:
    return isinstance(each, Example) and all(isinstance(part, str) for part in (each.adapter, each.input, each.output))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(prompt: str, answer: str) -> str:
    return answer if not prompt or prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def _continued(
    examples: Sequence[Example],
    answers: Sequence[str],
    prompts: Sequence[list[int]],
    apart: Sequence[list[int]],
    tokenizer: Any,
) -> list[list[int]]:
    """Tokens of the answers as they follow their prompts.

    Of the whole text, where it begins with the prompt's tokens: some tokenizers put a space of their own before a text,
    so that an answer on its own would begin with two. Where the whole joins letters of both sides into one token, the
    answer's own are taken, for it is the prompt's tokens that a model is given when it answers.
    """
    wholes = tokenizer([each.input + answer for each, answer in zip(examples, answers, strict=True)])["input_ids"]
    return [
        whole[len(prompt) :] if prompt and whole[: len(prompt)] == prompt else alone
        for prompt, whole, alone in zip(prompts, wholes, apart, strict=True)
    ]


def _parsed(line: str, adapters: Sequence[str] | Mapping[str, str] | None, labelled: bool) -> Example | str:
    """An example, or what is wrong with the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__}, expected an object"
    return example_of(entry, adapters, labelled=labelled)
