"""A routed model in the hands of others: pipeline, Trainer, lm-eval-harness, accelerate, bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from compose_models import assert_close, llama, prompt_ids, save_adapter
from compose_tasks import PROMPTS, SAMPLES, offline_encoder
from compose_zoo import lora, peft_adapter
from peft import PeftModel
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS: dict[str, dict[str, Any]] = {"arrow": {"top_k": 2}, "hilora": {"epsilon": 1e-3}}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def composed(model: Any, folders: dict[str, Path], tokenizer: Any, method: str) -> RoutedModel:
    given: dict[str, Any] = {"samples": SAMPLES, "encoder": offline_encoder()} if method == "hilora" else {}
    return compose(model, folders, method, tokenizer=tokenizer, **given, **METHODS[method])


@pytest.fixture(params=METHODS)
def routed(request: pytest.FixtureRequest, folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return composed(llama(), folders, tokenizer, request.param)


def logits(routed: RoutedModel, device: str = "cpu") -> torch.Tensor:
    inputs = routed.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt").to(device)
    with torch.no_grad():
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return routed(**given).logits[:, -1].float().cpu()


def test_a_pipeline_with_batches(routed: RoutedModel) -> None:
    tokenizer = routed.tokenizer
    generator = pipeline("text-generation", model=routed.model, tokenizer=tokenizer, batch_size=3)
    answers = generator(PROMPTS, return_full_text=False, **GREEDY)
    assert [answer["generated_text"] for (answer,) in answers] == routed.generate(PROMPTS, **GREEDY)


def rows_of(routed: RoutedModel) -> list[dict[str, Any]]:
    rows = [routed.tokenizer(prompt.ljust(20, "."))["input_ids"][:20] for prompt in PROMPTS[:4]]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]


def losses(routed: RoutedModel) -> float:
    """Mean loss over the rows, one by one."""
    with torch.no_grad():
        tensors = [{name: torch.tensor([each]) for name, each in row.items()} for row in rows_of(routed)]
        return sum(routed(**row).loss.item() for row in tensors) / len(tensors)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_the_base_under_frozen_adapters(
    routed: RoutedModel, checkpointing: bool, tmp_path: Path
) -> None:
    model = routed.model
    trained = model.model.norm.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is trained)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    banks = {update.module: (update.A.clone(), update.Bt.clone()) for _, update in routed_updates(model)}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows_of(routed), eval_dataset=rows_of(routed))
    before = losses(routed)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-4)
    trainer.train()
    assert losses(routed) < before
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed == ["model.norm.weight"]
    for _, update in routed_updates(model):
        for now, then in zip((update.A, update.Bt), banks[update.module], strict=True):
            assert torch.equal(now, then)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "saved").model.norm.weight, trained)


def test_lm_eval_harness(routed: RoutedModel) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install 'hub-router[harness]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = routed.tokenizer
    harness = HFLM(pretrained=routed.model, tokenizer=tokenizer, batch_size=1, max_length=64)
    pairs = [(prompt, " yes") for prompt in PROMPTS[:3]] + [(PROMPTS[0], " no")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (context, ending), (got, is_greedy) in zip(pairs, harness.loglikelihood(requests), strict=True):
        ids = torch.tensor([tokenizer(context + ending)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            # The last token is not read.
            steps = routed(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0, start - 1 :]
        assert got == pytest.approx(steps.gather(-1, ids[0, start:, None]).sum().item(), rel=1e-4)
        assert is_greedy == torch.equal(steps.argmax(-1), ids[0, start:])
    options = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, options), number) for number, prompt in enumerate(PROMPTS[:3])]
    plain = [routed.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in PROMPTS[:3]]
    assert harness.generate_until(asked) == [text.split("\n\n\n")[0] for text in plain]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "leaves"])
def test_a_device_map(routed: RoutedModel, folders: dict[str, Path], device_map: Any, tmp_path: Path) -> None:
    """Accelerate's hooks on the whole model, or on every module with a weight, beside those of the routing."""
    expected, text = logits(routed), routed.generate(PROMPTS, **GREEDY)
    if device_map == "leaves":
        leaves = {name.removesuffix(".weight"): "cpu" for name, _ in llama().named_parameters()}
        spread = dispatch_model(llama(), leaves, force_hooks=True)
        assert hasattr(spread.model.layers[0].self_attn.q_proj, "_hf_hook")
    else:
        llama().save_pretrained(tmp_path)
        spread = LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
    again = composed(spread, folders, routed.tokenizer, routed.method.name)
    assert_close(logits(again), expected)
    assert again.generate(PROMPTS, **GREEDY) == text
    again.detach()
    with torch.no_grad():
        assert torch.equal(spread(input_ids=prompt_ids(1, 5)).logits, llama()(input_ids=prompt_ids(1, 5)).logits)


def test_gradients_after_inference_mode(routed: RoutedModel) -> None:
    """What inference mode made on the way must not be met again by a gradient."""
    ids = routed.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        text = routed.generate(PROMPTS[0], **GREEDY)
        routed(input_ids=ids)
    routed.model.zero_grad()
    routed(input_ids=ids, labels=ids).loss.backward()
    assert routed.model.model.embed_tokens.weight.grad.any()
    assert routed.generate(PROMPTS[0], **GREEDY) == text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus(routed: RoutedModel, folders: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(routed)
    llama().save_pretrained(tmp_path)
    for split in (
        {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1},
        # Within a layer as well: the inputs of a map are then on another device than its weight.
        {
            **{name.removesuffix(".weight"): 0 for name, _ in llama().named_parameters()},
            "model.layers.0.self_attn.v_proj": 1,
            "model.layers.1.mlp.down_proj": 1,
        },
    ):
        spread = LlamaForCausalLM.from_pretrained(tmp_path, device_map=split).eval()
        again = composed(spread, folders, routed.tokenizer, routed.method.name)
        assert_close(logits(again, "cuda:0"), expected, 1e-3)
        assert {update.A.device.index for _, update in routed_updates(spread)} == {0, 1}
        again.generate(PROMPTS, **GREEDY)


QUANTISED = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}


def wide(seed: int = 0) -> Any:
    """Quantisation works by blocks of 64."""
    return llama(seed, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bits", QUANTISED)
def test_a_quantised_base_equals_peft(bits: str, device: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'hub-router[quantised]'")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wide().save_pretrained(tmp_path / "base")
    pool = {
        "plain": peft_adapter(wide, tmp_path / "plain", 1, lora(["q_proj", "down_proj"])),
        "dora": peft_adapter(wide, tmp_path / "dora", 2, lora(["q_proj", "v_proj"], use_dora=True)),
    }
    ids = prompt_ids(2, 9).to(device)

    def load() -> Any:
        options = {"quantization_config": QUANTISED[bits], "device_map": {"": device}, "dtype": torch.float32}
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    base = load()
    with torch.no_grad():
        before = base(input_ids=ids).logits
        for name, folder in pool.items():
            expected = PeftModel.from_pretrained(load(), folder).eval()(input_ids=ids).logits
            routed = compose(base, pool, "single", adapter=name)
            assert_close(routed(input_ids=ids).logits, expected, 1e-5 if device == "cpu" else 1e-2)
            routed.set_method("arrow", top_k=1)
            mixed = routed(input_ids=ids).logits
            assert not torch.allclose(mixed, before, atol=1e-2)
            routed.detach()
            assert torch.equal(base(input_ids=ids).logits, before)


@pytest.mark.parametrize("bits", QUANTISED)
def test_a_quantised_base_is_saved_and_loaded(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'hub-router[quantised]'")
    wide().save_pretrained(tmp_path / "base")
    options = {"quantization_config": QUANTISED[bits], "device_map": {"": "cpu"}, "dtype": torch.float32}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()
    folder = save_adapter(wide(), tmp_path / "adapter", 1, r=4, target_modules=["q_proj", "up_proj"])
    routed = compose(base, [folder], "arrow")
    routed.save(tmp_path / "saved")
    again = RoutedModel.load(tmp_path / "saved")
    ids = prompt_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, routed(input_ids=ids).logits)
