"""A real catalog made with the real commands: a tiny Llama, four PEFT adapters as local folders, a SQLite home."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import TASKS, Run, World, invoke, save_adapter
from click.testing import Result


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with a word-level tokenizer, saved as a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = " ".join(f"{prompt} {answer}" for *_, prompt, answer in TASKS.values())
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += list(dict.fromkeys(texts.replace("?", " ?").split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[:4] = 0  # so that the likeliest token is a word
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four adapters, synced and indexed. Tests that change the home take ``home`` instead."""
    top = tmp_path_factory.mktemp("adapters")
    adapters = {task: top / task for task in TASKS}
    for seed, (task, folder) in enumerate(adapters.items()):
        save_adapter(base_model, folder, task, seed)
    home = tmp_path_factory.mktemp("home")
    for arguments in (["sync", *adapters.values()], ["index", "--encoder", "offline"]):
        done = invoke([*arguments, "--home", home])
        assert done.exit_code == 0, done.output
    return World(base_model, adapters, home)


@pytest.fixture
def home(world: World, tmp_path: Path) -> Path:
    """A copy of the world's home that the test may change."""
    return Path(shutil.copytree(world.home, tmp_path / "home"))


@pytest.fixture
def run(home: Path) -> Run:
    """Runs a command line on the copied home and checks its exit status."""

    def call(*arguments: object, status: int = 0, **keywords: Any) -> Result:
        done = invoke([str(entry) for entry in arguments] + ["--home", str(home)], **keywords)
        assert done.exit_code == status, f"status {done.exit_code}, expected {status}\n{done.output}"
        assert "Traceback" not in done.output
        return done

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Runs a command line with ``--json`` and parses stdout, which must hold nothing else."""

    def call(*arguments: object, **keywords: Any) -> Any:
        return json.loads(run(*arguments, "--json", **keywords).stdout)

    return call


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the developer's catalog or token, or reaches the Hub."""
    for name in ("HUB_ROUTER_HOME", "HUB_ROUTER_DATABASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert os.environ.get("HF_ENDPOINT") is None
