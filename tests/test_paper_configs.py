"""Every config of examples/papers, as shipped, against a loopback Hub that serves tiny stand-ins for what it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from hub_router.cli.training import train
from hub_router.demo.hubserver import Answer, LoopbackHub
from hub_router.sync.manifest import load_manifest

PAPERS = Path(__file__).resolve().parents[1] / "examples" / "papers"
CONFIGS = {path.stem: tomllib.loads(path.read_text()) for path in sorted(PAPERS.glob("*.toml"))}
EVALUATIONS = {path.stem: tomllib.loads(path.read_text()) for path in sorted(PAPERS.glob("evaluation/*.toml"))}
# Adapters in the pool, examples and steps, counted by hand from the stand-ins of this file: three samples per adapter,
# and 30 rows in each data set, ten of each of its tasks.
EXPECTED = {
    "maple-phi-2": (3, 6, 1),
    "maple-llama-3-8b": (28, 56, 4),
    "phatgoose-llama-3-8b": (28, 56, 28 * 100),
    "maple-phatgoose-llama-3-8b": (28, 56, 4),
    "lora-mixer-llama-3-8b": (6, 18, 5),
    "lora-mixer-mistral-7b": (27, 2, 1),
    "phatgoose-flan-t5-large": (196, 588, 196 * 100),
    "lorahub-flan-t5-large": (20, 5, 40),
    "ewora-mistral-7b-math": (0, 30, 8),
    "ewora-mistral-7b-code": (0, 30, 8),
    "shared-mistral-7b-math": (0, 30, 8),
    "shared-mistral-7b-code": (0, 30, 8),
    "mixlora-mistral-7b-math": (8, 30, 4),
}
EVALUATED = {"arrow-phi-3": 10, "hilora-flan-t5-large": 196, "hilora-llama-2-7b": 10, "spectr-llama-3-8b": 28}
TASKS = ("add", "compare", "sort")
# Two of each task, so that a choice has to be made among three samples and among ten rows.
CHOSEN = ("--per-task", "2")
DRIVER = """
import json, sys
from click.testing import CliRunner
from hub_router.cli import main
done = []
for arguments in json.load(open(sys.argv[1])):
    result = CliRunner(catch_exceptions=False).invoke(main, arguments)
    done.append([result.exit_code, result.stdout, result.stderr])
    if result.exit_code:
        break
json.dump(done, open(sys.argv[2], "w"))
"""


class BothHub(LoopbackHub):
    """Serves models, and data sets as well; the Hub's protocol for them differs in the addresses alone."""

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        as_model = re.sub(r"^/datasets/", "/", re.sub(r"^/api/datasets/", "/api/models/", target))
        return super().answer(method, as_model, headers, body)


@dataclass(frozen=True)
class Bench:
    """A home in which the collections are synced, and how commands run on it."""

    folder: Path
    environment: Mapping[str, str]

    def evaluate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``evaluate.py`` on the same home."""
        command = [sys.executable, str(PAPERS / "evaluate.py"), *arguments]
        environment = dict(self.environment)
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def run(self, *lines: list[str]) -> list[tuple[int, str, str]]:
        """Command lines in one process, up to the first that fails."""
        (self.folder / "lines.json").write_text(json.dumps(lines))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, "lines.json", "done.json"],
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [(code, out, err) for code, out, err in json.loads((self.folder / "done.json").read_text())]


def save_base(folder: Path, kind: str) -> None:
    """A model of two layers of one of transformers' kinds, with a tokenizer of single letters."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    sizes: dict[str, Any] = {"vocab_size": len(letters), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "T5":
        sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    head = "ForConditionalGeneration" if kind == "T5" else "ForCausalLM"
    getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**sizes)).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_adapter(base: Path, name: str, folder: Path) -> None:
    """A random adapter, which states its base model's id, with three samples and one that is held out."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    t5 = "t5" in name
    model = (AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM).from_pretrained(base)
    targets = ["q", "v"] if t5 else ["qkv_proj"] if "Phi-3" in name else ["q_proj", "v_proj"]
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    (folder / "README.md").write_text(f"---\nbase_model: {name}\n---\n# An adapter\n")
    lines = [json.dumps({"input": f"What is {number}?", "output": "true"}) + "\n" for number in range(3)]
    (folder / "samples.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text(json.dumps({"input": "What is this?", "output": "true"}) + "\n")


def save_dataset(folder: Path, entry: Mapping[str, Any]) -> None:
    """Thirty rows in the columns that a config names, of three tasks."""
    folder.mkdir(parents=True)
    config, split = entry.get("dataset-config", "default"), entry.get("dataset-split", "train")
    files = f"configs:\n- config_name: {config}\n  data_files:\n  - {{split: {split}, path: rows.jsonl}}\n"
    (folder / "README.md").write_text(f"---\n{files}---\n")
    rows = [
        {entry["column"]: f"How much is {number}?", entry["output-column"]: "four", "task_name": task, "source_": 1}
        for task in TASKS
        for number in range(10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Everything that the configs name, on a Hub of its own; collections synced, Phi-2's pool composed."""
    root, top = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("bench")
    kinds = {"microsoft/phi-2": "Phi", "google/flan-t5-large": "T5", "mistralai/Mistral-7B-v0.1": "Mistral"}
    kinds |= {"meta-llama/Meta-Llama-3-8B": "Llama", "meta-llama/Llama-2-7b-hf": "Llama"}
    kinds |= {"microsoft/Phi-3-mini-4k-instruct": "Phi3"}
    models: dict[str, Path] = {}
    for name, kind in kinds.items():
        save_base(root / name, kind)
        models[name] = top / "models" / name
        save_adapter(root / name, name, models[name])
    entries = [*CONFIGS.values(), *EVALUATIONS.values()]
    collections = sorted({entry["collection"] for entry in entries if "collection" in entry})
    for collection in collections:
        manifest = load_manifest(collection)
        assert manifest.base_model in kinds
        for member in manifest.members:
            shutil.copytree(models[manifest.base_model], root / member)
    for entry in CONFIGS.values():
        if "data" in entry and not (root / entry["data"]).exists():
            save_dataset(root / entry["data"], entry)
    for task in TASKS:
        shutil.copytree(models["microsoft/phi-2"], top / "own" / task)
    with BothHub(root) as server:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_ROUTER_"))},
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(top / "huggingface"),
            "HUB_ROUTER_HOME": str(top / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        made = Bench(top, environment)
        done = made.run(
            *(["sync", "--collection", name] for name in collections),
            ["sync", "own"],
            ["index", "--encoder", "offline"],
            ["compose", "phi-2-flan", *(str(top / "own" / task) for task in TASKS), "--base-model", "microsoft/phi-2"],
        )
        assert not done[-1][0], done[-1]
        yield made


def test_every_config_has_its_figures_here() -> None:
    assert sorted(CONFIGS) == sorted(EXPECTED)
    assert sorted(EVALUATIONS) == sorted(EVALUATED)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_what_a_user_must_know(name: str) -> None:
    entry = CONFIGS[name]
    text = (PAPERS / f"{name}.toml").read_text()
    assert text.startswith("# ") and "https://" in text.partition("method")[0]
    assert {"method", "base", "log", "set"} <= set(entry)
    options = {opt.lstrip("-") for each in train.params if isinstance(each, click.Option) for opt in each.opts}
    assert set(entry) <= options | {"method"}
    if "collection" in entry:
        assert load_manifest(entry["collection"]).base_model == entry["base"]


def test_every_config_as_shipped(bench: Bench) -> None:
    """Adapters, base model, data set and settings of each are checked; MAPLE on PHATGOOSE needs trained gates first."""
    first = ["train", "--config", str(PAPERS / "phatgoose-llama-3-8b.toml"), "--per-task", "1", "--set", "steps=1"]
    trained = bench.run([*first, "--set", "precision=float32", "--json"])[0]
    assert not trained[0], trained
    assert json.loads(trained[1])["prototypes"] == "phatgoose-llama-3-8b@1"
    lines = [
        ["train", "--config", str(PAPERS / f"{name}.toml"), "--dry-run", "--json", *_choice(entry)]
        for name, entry in CONFIGS.items()
    ]
    done = bench.run(*lines)
    assert len(done) == len(CONFIGS) and not done[-1][0], done[-1]
    found = {}
    for name, (_, out, _) in zip(CONFIGS, done, strict=True):
        made = json.loads(out)
        found[name] = (len(made["adapters"]) if "adapters" in made else None, made["examples"], made["steps"])
    assert found == EXPECTED


def _choice(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the stand-ins fewer than the config asks for, where that is more than there are."""
    return CHOSEN if entry.get("per-task", 0) > 10 else ()


def test_a_setting_that_is_wrong_in_a_config_is_named(bench: Bench) -> None:
    path = bench.folder / "wrong.toml"
    text = (PAPERS / "lora-mixer-llama-3-8b.toml").read_text()
    path.write_text(text.replace("entropy_weight", "entropy_wait"))
    code, _, errors = bench.run(["train", "--config", str(path), "--dry-run"])[0]
    assert code == 1 and "there are no settings entropy_wait" in errors


@pytest.mark.parametrize("name", EVALUATIONS)
def test_pools_to_evaluate_fit(bench: Bench, name: str) -> None:
    entry = EVALUATIONS[name]
    assert load_manifest(entry["collection"]).base_model == entry["base"]
    done = bench.evaluate(str(PAPERS / "evaluation" / f"{name}.toml"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Stored {name}: {EVALUATED[name]} adapters on {entry['base']}.\n"


def test_an_evaluation_from_its_config(bench: Bench) -> None:
    path = bench.folder / "small.toml"
    text = (PAPERS / "evaluation" / "arrow-phi-3.toml").read_text()
    path.write_text(text.replace("[set]", 'tasks = ["ts_expert_3"]\nsamples = 1\nunseen = true\n[set]'))
    done = bench.evaluate(str(path), "--out", "table.json")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \|$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows[1:]] == ["base", "uniform", "arrow:top_k=4", "spectr:top_k=4"]
    table = json.loads((bench.folder / "table.json").read_text())
    assert [row["task"] for row in table["rows"]] == ["ts_expert_3"]
    path.write_text(text.replace("arrow:top_k", "arrow:top_q").replace("name =", "nome ="))
    assert "nome is no key; name is missing" in bench.evaluate(str(path)).stderr
    path.write_text(text.replace("arrow:top_k", "arrow:top_q"))
    assert "top_q" in bench.evaluate(str(path), "--dry-run").stderr
