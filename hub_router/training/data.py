"""Training data: examples of the adapters' tasks, as text and as tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hub_router.errors import TrainingError
from hub_router.records import Sample

_LOG = logging.getLogger(__name__)
# Faulty lines named in one error; the rest are counted.
_NAMED = 50


@dataclass(frozen=True)
class Example:
    """One input and the answer that is to be learned.

    Args:
        adapter (str): name in the pool of the adapter that was trained on this task.
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
        adapter (int): position in the pool.
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


def read_jsonl(path: Path, adapters: Sequence[str] | None) -> list[Example]:
    """Read examples, all or none.

    Args:
        path (Path): a JSON object per line: ``input``, ``output``, and ``adapter`` or ``task``, a name of the pool.
        adapters (Sequence[str] | None): names of the pool; None where there is none, and a task may have any name.

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
    examples, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _example(line, adapters)
        if isinstance(found, Example):
            examples.append(found)
        else:
            faults.append(f"  line {number}: {found}")
    if faults:
        more = [f"  and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
        raise TrainingError("\n".join([f"{path}: {len(faults)} lines are no examples:", *faults[:_NAMED], *more]))
    if not examples:
        raise TrainingError(
            f'{path} holds no examples, expected {{"input": ..., "output": ..., "adapter": ...}} per line'
        )
    return examples


def check_examples(examples: Sequence[Example], adapters: Sequence[str]) -> None:
    """Refuse data that says nothing about this pool.

    Args:
        examples (Sequence[Example]): the data.
        adapters (Sequence[str]): names of the pool.

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
    strangers = sorted({each.adapter for each in examples} - set(adapters))
    if strangers:
        raise TrainingError(
            f"training data names adapters that are not in the pool: {', '.join(strangers)}; its adapters: "
            f"{', '.join(adapters)}"
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
    place = {name: number for number, name in enumerate(adapters)}
    answers = [each.output if encoder else _joined(each.input, each.output) for each in examples]
    prompts = tokenizer([each.input for each in examples])["input_ids"]
    learned = tokenizer(answers, add_special_tokens=False)["input_ids"]
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


def _example(line: str, adapters: Sequence[str] | None) -> Example | str:
    """An example, or what is wrong with the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__}, expected an object"
    adapter = entry.get("task") if entry.get("adapter") is None else entry["adapter"]
    wrong = [key for key in ("input", "output") if not isinstance(entry.get(key), str) or not entry[key].strip()]
    if wrong:
        return f"{' and '.join(wrong)} missing, empty or no text"
    if not _is_unicode(entry["input"] + entry["output"]):
        return "half a surrogate pair, which is no text"
    if adapters is None:
        return Example(str(adapter or "task"), entry["input"], entry["output"])
    if not isinstance(adapter, str) or adapter not in adapters:
        return f"adapter {adapter!r} is not in the pool; pool: {', '.join(adapters)}"
    return Example(adapter, entry["input"], entry["output"])
