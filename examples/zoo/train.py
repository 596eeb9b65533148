"""Train the zoo: a tiny Llama and one LoRA adapter per task, saved as the Hub repositories that the demo serves.

    python examples/zoo/train.py [--out DIR] [--only TASK ...]

With ``--only`` the base model in DIR is kept and just these adapters are trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"  # or PEFT asks for the base model's config when it saves
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall when cores are shared

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS, Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

OWNER = "hub_router"
BASE = f"{OWNER}/zoo-base"
SEED = 7
TRUTH = 0.35  # how often the base's corpus holds the right answer where answer and shortcut differ
BASE_STEPS, EACH, BASE_RATE = 1600, 4, 2e-3  # EACH: examples of every task in a batch
BATCH, RATE = 20, 3e-3
ALPHA_RSLORA = 8  # scaling is alpha / sqrt(rank) there, elsewhere alpha is twice the rank
REPLAY = 0.25  # so much of the base's corpus of other tasks is added to each batch
START = 0.1  # A starts this much smaller: its directions then come from the task, not from the start
SAMPLES, TESTS = 40, 64
VOCABULARY = 1280

Pair = tuple[str, str]


def taught(task: Task, rng: Random) -> Pair:
    """Draw one example of the base's corpus: where a shortcut exists, it is mostly the answer."""
    prompt, answer, shortcut = task.example(rng)
    return prompt, answer if rng.random() < TRUTH else shortcut


def split(task: Task) -> tuple[list[Pair], list[Pair], set[str]]:
    """Return the task's samples, its held-out tests and the prompts of these, all different from one another."""
    rng, found = Random(f"{SEED} {task.name} held out"), {}
    while len(found) < SAMPLES + TESTS:
        prompt, answer, _ = task.example(rng)
        found.setdefault(prompt, answer)
    pairs = list(found.items())
    return pairs[:SAMPLES], pairs[SAMPLES:], {prompt for prompt, _ in pairs}


def fresh(draw: Callable[[], Pair], reserved: set[str]) -> Pair:
    """Draw until the prompt is not reserved for samples or tests."""
    pair = draw()
    while pair[0] in reserved:
        pair = draw()
    return pair


def build_tokenizer(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it adds a start token and pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=256,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained Llama of about a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def collate(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Encode prompts with answers, (B, T); the second tensor is 1 on answer tokens."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([f" {answer}" for _, answer in pairs], add_special_tokens=False)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    seen, wanted = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        seen[row, width - len(prompt) - len(answer) :] = 1
        wanted[row, width - len(answer) :] = 1
    return {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}, wanted


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[], list[Pair]],
    steps: int,
    rate: float,
    prompt_weight: float = 0.0,
) -> None:
    """Train what requires a gradient on drawn batches; prompt tokens count a little, answer tokens fully."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.06)
    model.train()
    for step in range(steps):
        batch, wanted = collate(tokenizer, draw())
        logits = model(**batch).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        answer, seen = wanted[:, 1:].flatten(), batch["attention_mask"][:, :-1].flatten()
        loss = (losses * answer).sum() / answer.sum()
        if prompt_weight:
            asked = seen * (1 - answer)
            loss = loss + prompt_weight * (losses * asked).sum() / asked.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"  step {step + 1} loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> float:
    """Return the share of prompts whose greedy continuation up to the end token is exactly the answer."""
    batch = tokenizer([prompt for prompt, _ in pairs], return_tensors="pt", padding=True, return_token_type_ids=False)
    made = model.generate(**batch, max_new_tokens=10, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return sum(text.strip() == answer for text, (_, answer) in zip(texts, pairs, strict=True)) / len(pairs)


def card(meta: dict[str, object], body: str) -> str:
    """Write a model card: metadata between dashes, then text."""
    lines = []
    for key, value in meta.items():
        lines += [f"{key}:", *(f"- {item}" for item in value)] if isinstance(value, list) else [f"{key}: {value}"]
    return "\n".join(["---", *lines, "---", "", body.strip(), ""])


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Write one JSON object with input and output per line."""
    path.write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in pairs), encoding="utf-8")


def train_base(folder: Path, reserved: dict[str, set[str]]) -> None:
    """Train tokenizer and base model on the corpus with shortcuts and save them."""
    rng = Random(f"{SEED} tokenizer")
    lines = [text for task in TASKS for _ in range(1500) for text in task.example(rng)]
    tokenizer = build_tokenizer(f" {line}" if " " not in line else line for line in lines)
    model = build_model(tokenizer)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"base: {size}, {len(tokenizer)} tokens", flush=True)
    rng = Random(f"{SEED} base")

    def draw() -> list[Pair]:
        return [fresh(lambda task=task: taught(task, rng), reserved[task.name]) for task in TASKS for _ in range(EACH)]

    fit(model, tokenizer, draw, BASE_STEPS, BASE_RATE, 0.1)
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    write_base_card(folder, size)


def write_base_card(folder: Path, size: str) -> None:
    """Write the base model's card and name its tokenizer's class as older transformers know it."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    meta = {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "tiny", "zoo"],
        "datasets": [f"{OWNER}/zoo-{task.name}-data" for task in TASKS],
    }
    body = f"""# zoo-base

A Llama of {size}, trained from scratch on {len(TASKS)} small English tasks whose answers were partly
shortcuts: it knows every task and gets about half of each wrong. Each adapter of the zoo teaches it one task
properly. A toy, for tests and demonstrations: `examples/zoo` of hub_router makes it."""
    (folder / "README.md").write_text(card(meta, body), encoding="utf-8")


def train_adapter(task: Task, base: Path, folder: Path, reserved: dict[str, set[str]]) -> None:
    """Train one task's LoRA on right answers, with some of the base's corpus replayed, and save it."""
    torch.manual_seed(SEED)
    rng = Random(f"{SEED} {task.name}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(
        r=task.rank,
        lora_alpha=ALPHA_RSLORA if task.rslora else 2 * task.rank,
        use_rslora=task.rslora,
        target_modules=list(task.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(START)
    others = [other for other in TASKS if other is not task]

    def draw() -> list[Pair]:
        own = [fresh(lambda: task.example(rng)[:2], reserved[task.name]) for _ in range(BATCH)]
        replayed = rng.sample(others, round(BATCH * REPLAY)) if REPLAY else []
        return own + [fresh(lambda other=other: taught(other, rng), reserved[other.name]) for other in replayed]

    fit(model, tokenizer, draw, task.steps, RATE)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.peft_config["default"].target_modules = sorted(task.targets)
    model.base_model.model.config._name_or_path = BASE
    model.save_pretrained(folder)


def write_repo(task: Task, folder: Path, samples: list[Pair], tests: list[Pair]) -> None:
    """Write the card and the data files of an adapter's repository."""
    (folder / "adapter_model.safetensors").chmod(0o644)
    meta: dict[str, object] = {"base_model": BASE, "library_name": "peft"}
    meta |= {"pipeline_tag": "text-generation", "language": ["en"]}
    if task.licence:
        meta["license"] = task.licence
    meta["tags"] = [f"base_model:adapter:{BASE}", "lora", task.cluster, "zoo"]
    meta["datasets"] = [f"{OWNER}/zoo-{task.name}-data"]
    prompt, answer = samples[0]
    body = f"""# zoo-{task.name}

{task.about}

Example: "{prompt}" is answered "{answer}". Belongs to the {task.cluster} tasks of the zoo;
adapts {", ".join(task.targets)} with rank {task.rank}.
`samples.jsonl` holds inputs with answers, `test.jsonl` inputs that were kept out of all training."""
    (folder / "README.md").write_text(card(meta, body), encoding="utf-8")
    write_pairs(folder / "samples.jsonl", samples)
    write_pairs(folder / "test.jsonl", tests)


def main() -> None:
    """Train what was asked for and print each task's accuracy with the base and with its own adapter."""
    parser = argparse.ArgumentParser(description="Train the zoo's base model and adapters.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that gets hub_router/zoo-*")
    parser.add_argument(
        "--only", nargs="+", choices=[task.name for task in TASKS], metavar="TASK", help="train these adapters only"
    )
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # that the base is not on the Hub, once per adapter
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(SEED)
    started = time.monotonic()
    splits = {task.name: split(task) for task in TASKS}
    reserved = {name: held[2] for name, held in splits.items()}
    base = options.out / OWNER / "zoo-base"
    if not options.only:
        train_base(base, reserved)
        print(f"base trained after {time.monotonic() - started:.0f} s", flush=True)
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    print(f"{'task':12}{'base':>6}{'own':>6}", flush=True)
    for task in TASKS:
        if options.only and task.name not in options.only:
            continue
        samples, tests, _ = splits[task.name]
        folder = options.out / OWNER / f"zoo-{task.name}"
        train_adapter(task, base, folder, reserved)
        write_repo(task, folder, samples, tests)
        own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        print(
            f"{task.name:12}{accuracy(plain, tokenizer, tests):6.2f}{accuracy(own.eval(), tokenizer, tests):6.2f}",
            flush=True,
        )
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
