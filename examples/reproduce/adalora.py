"""AdaLoRA's run: as an adapter of any other type is trained, but that its budget shrinks from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch

from hub_router.training import Example, TrainingSettings
from hub_router.training.batches import collate, draw
from hub_router.training.data import encode


def fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], rank: int, alpha: int, settings: TrainingSettings
) -> tuple[Any, float]:
    """Train one adapter that ends with as many rank-one components as a LoRA of the rank.

    It begins with half as many again, as PEFT's defaults do; the budget falls after a tenth of the steps, and is final
    for the last three tenths. Batches, rate and schedule are those of ``hub_router.training``.

    Args:
        model (PreTrainedModel): the base model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        examples (Sequence[Example]): of all tasks.
        rank (int): mean rank over modules at the end.
        alpha (int): ``lora_alpha``.
        settings (TrainingSettings): with ``steps``.

    Returns:
        tuple[PeftModel, float]: the trained model, and the mean loss of the last tenth of the steps, which has the
            term for orthogonality in it.
    """
    steps, tasks = settings.steps or 1, list(dict.fromkeys(each.adapter for each in examples))
    encoded = encode(examples, tasks, tokenizer, model.config.max_position_embeddings, False)
    torch.manual_seed(settings.seed)
    config = peft.AdaLoraConfig(
        target_r=rank,
        init_r=rank * 3 // 2,
        lora_alpha=alpha,
        target_modules="all-linear",
        tinit=steps // 10,
        tfinal=steps * 3 // 10,
        total_step=steps,
    )
    adapted = peft.get_peft_model(model, config)
    learned = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, steps)
        batch = draw(encoded, settings.batch_size, (settings.seed, 0, step))
        read = collate(batch, tokenizer.pad_token_id, model, False, model.device)
        loss = adapted(**read.inputs, labels=read.labels).loss  # with PEFT's term for orthogonality
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.clip)
        optimizer.step()
        adapted.base_model.update_and_allocate(step)
        losses.append(loss.item())
    recent = losses[-max(1, steps // 10) :]
    return adapted.eval(), sum(recent) / len(recent)


def size(adapted: Any) -> int:
    """Parameters of the components that are left: ``D_in + D_out + 1`` of each."""
    found = 0
    for module in adapted.modules():
        if isinstance(module, peft.tuners.adalora.SVDLinear):
            kept = int((module.lora_E["default"] != 0).sum())
            found += kept * (module.in_features + module.out_features + 1)
    return found
