"""``generate --explain``: each token in the colour of the adapter that won it, a legend, and mean weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.output import Output, printable

if TYPE_CHECKING:
    from hub_router.composition.explain import Explanation

# Colours of the 256-colour cube that differ in hue and are legible on dark and on light backgrounds.
PALETTE = (33, 208, 34, 161, 37, 129, 136, 69, 166, 71, 169, 101)


def winners(weights: Sequence[Sequence[float]]) -> list[int | None]:
    """The adapter with the largest weight on each token.

    Args:
        weights (Sequence[Sequence[float]]): ``(T, E)``, not negative.

    Returns:
        list[int | None]: per token its position on axis E; None where every weight is zero.
    """
    return [max(range(len(row)), key=row.__getitem__) if any(row) else None for row in weights]


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """An explanation for ``--json``.

    Args:
        explanation (Explanation): from ``RoutedModel.explain``.

    Returns:
        dict[str, Any]: tokens with their winner and weights, and the mean weight of each adapter.
    """
    weights = explanation.weights.tolist()
    names = explanation.adapters
    return {
        "tokens": [
            {
                "text": token,
                "generated": position >= explanation.prompt_tokens,
                "adapter": None if winner is None else names[winner],
                "weights": dict(zip(names, row, strict=True)),
            }
            for position, (token, winner, row) in enumerate(
                zip(explanation.tokens, winners(weights), weights, strict=True)
            )
        ],
        "mean_weights": dict(zip(names, _means(weights, len(names)), strict=True)),
    }


def show_explanation(out: Output, explanation: Explanation) -> None:
    """Write an explanation for a person.

    Args:
        out (Output): where to; without colours every token is followed by its adapter's number.
        explanation (Explanation): from ``RoutedModel.explain``.
    """
    weights = explanation.weights.tolist()
    won = winners(weights)
    colours = out.terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    pieces = [
        _coloured(token, winner, position >= explanation.prompt_tokens) if colours else _numbered(token, winner)
        for position, (token, winner) in enumerate(zip(explanation.tokens, won, strict=True))
    ]
    prompt, new = pieces[: explanation.prompt_tokens], pieces[explanation.prompt_tokens :]
    # Pieces are printable already; passing them through the sink's own filter would show the colour codes as text.
    click.echo(f"Prompt: {''.join(prompt)}\nAnswer: {''.join(new)}\n")
    means = _means(weights, len(explanation.adapters))
    order = sorted(range(len(means)), key=lambda i: (-means[i], i))
    out.table(
        ["#", "adapter", "tokens won", "mean weight"],
        [[i, explanation.adapters[i], won.count(i), means[i]] for i in order],
    )
    if colours:
        legend = (_coloured(explanation.adapters[i], i, False) for i in order if i in won)
        click.echo("Colours: " + "  ".join(legend))


def _coloured(token: str, winner: int | None, strong: bool) -> str:
    """A token in its adapter's colour; new text is bold."""
    colour = None if winner is None else PALETTE[winner % len(PALETTE)]
    return click.style(printable(token), fg=colour, bold=strong or None)


def _numbered(token: str, winner: int | None) -> str:
    """A token followed by its adapter's number, white space kept outside."""
    text = printable(token)
    return text if winner is None or not text.strip() else f"{text}[{winner}]"


def _means(weights: Sequence[Sequence[float]], experts: int) -> list[float]:
    """Mean weight per adapter over all tokens."""
    return [sum(row[i] for row in weights) / len(weights) if weights else 0.0 for i in range(experts)]
