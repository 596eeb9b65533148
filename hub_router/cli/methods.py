"""``methods``: who routes, and what can be set."""

from __future__ import annotations

import json

import click

from hub_router.cli.options import Call, common_options


@click.command()
@common_options
def methods(call: Call) -> None:
    """List the routing methods and their hyperparameters.

    Choose one with compose --method, set its hyperparameters with compose --set.
    """
    from hub_router.hub import methods as all_methods

    known = all_methods()
    call.out.document({"methods": known})
    call.out.table(
        ["method", "gate", "hyperparameters", "paper"],
        [
            [
                method.name,
                method.title,
                [
                    each.name if each.required else f"{each.name}={json.dumps(each.default)}"
                    for each in method.hyperparameters
                ],
                method.paper,
            ]
            for method in known
        ],
    )
    lines = [
        f"  {method.name}.{each.name}: {each.help}; {each.valid}" for method in known for each in method.hyperparameters
    ]
    call.out.text("\n".join(["", "Hyperparameters", *lines]))
