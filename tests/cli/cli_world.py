"""Tiny tasks and adapters for the tests of the command line, and how to run it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from hub_router.cli import main

# Task -> (rank, targets, licence, prompt, answer).
TASKS = {
    "colours": (4, ["q_proj", "v_proj"], "mit", "What colour is the sky?", "blue"),
    "capitals": (8, ["q_proj", "v_proj"], "apache-2.0", "What is the capital of France?", "Paris"),
    "sums": (2, ["gate_proj", "up_proj", "down_proj"], None, "How much is two plus two?", "four"),
    "moods": (4, ["q_proj", "k_proj", "v_proj", "o_proj"], "mit", "Is this film review positive?", "yes"),
}
SAMPLES = 4


@dataclass(frozen=True)
class World:
    """What a test starts from.

    Args:
        base (Path): folder of the base model.
        adapters (dict[str, Path]): adapter folders by task.
        home (Path): home in which all of them are synced and indexed.
    """

    base: Path
    adapters: dict[str, Path]
    home: Path


Run = Callable[..., Result]


def invoke(arguments: Sequence[str], **keywords: Any) -> Result:
    """Run one command line in this process; a traceback is a failure of the test, never an exit status."""
    return CliRunner(catch_exceptions=False).invoke(main, [str(entry) for entry in arguments], **keywords)


def save_adapter(base: Path, folder: Path, task: str, seed: int = 1) -> None:
    """An adapter as PEFT saves it, with a card, samples and held-out samples."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    rank, targets, licence, prompt, answer = TASKS[task]
    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    front = ["---", f"base_model: {base}", "tags: [demo, " + task + "]"]
    front += [f"license: {licence}"] if licence else []
    (folder / "README.md").write_text("\n".join([*front, "---", f"# {task}", f"Answers questions such as: {prompt}"]))
    for file, count in (("samples.jsonl", SAMPLES), ("test.jsonl", 2)):
        lines = [json.dumps({"input": prompt, "output": answer})] * count
        (folder / file).write_text("\n".join(lines) + "\n")
