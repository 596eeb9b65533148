"""``generate``: text from a stored composition."""

from __future__ import annotations

import sys
from typing import Any

import click

from hub_router.cli.explanation import explanation_data, show_explanation
from hub_router.cli.options import Call, common_options, device_option


@click.command()
@click.argument("name")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Length limit."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    help="Sample at this temperature. Default: 0, the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="P",
    help="Sample from the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Makes sampling repeatable.")
@click.option("--explain", is_flag=True, help="Show which adapter won each token, and mean weights per adapter.")
@device_option
@common_options
def generate(
    call: Call,
    name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    explain: bool,
    device: str | None,
) -> None:
    """Generate text with a stored composition.

    PROMPT "-" reads the prompt from stdin, less one newline at its end. The new text is written as it comes.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p)}
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    with call.hub() as hub:
        routed = hub.load(name, device=device)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    document: dict[str, Any] = {"composition": name, "prompt": prompt}
    if explain:
        explanation = routed.explain(prompt, **options)
        if not call.out.as_json:
            show_explanation(call.out, explanation)
        document |= {"text": explanation.text, **explanation_data(explanation)}
    else:
        document |= {"text": call.out.stream(routed.stream(prompt, **options))}
    call.out.document(document)


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of transformers' ``generate`` for two of ours.

    Args:
        temperature (float | None): 0 and None mean greedy, unless ``top_p`` asks for sampling.
        top_p (float | None): probability mass to sample from.

    Returns:
        dict[str, Any]: whatever the model's own generation config says, sampling only where it was asked for.
    """
    if temperature == 0 and top_p is not None:
        raise click.UsageError("--top-p samples, --temperature 0 does not; give one of them")
    if not temperature and top_p is None:
        return {"do_sample": False}
    chosen = {"temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p}
    return {"do_sample": True, **chosen}
