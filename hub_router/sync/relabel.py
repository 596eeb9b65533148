"""What an unchanged adapter's licence and tags are now: its README is the same, the Hub's own statement may not be."""

from __future__ import annotations

from pathlib import Path

from hub_router.store.labels import HeldLabels, Labels
from hub_router.sync.card import Card, with_hub
from hub_router.sync.describe import read_cards


def relabel(held: HeldLabels, hub: Card) -> Labels | None:
    """Licence and tags of an adapter whose files did not change.

    Args:
        held (HeldLabels): what the catalog holds.
        hub (Card): what the Hub states now.

    Returns:
        Labels | None: None where they cannot differ from those held.
    """
    # Most adapters' labels are the Hub's, and the READMEs of a large listing need not be parsed at every run.
    if held.labels == Labels(hub.licence, frozenset(hub.tags)):
        return None
    depth = held.subfolder.count("/") + 1 if held.subfolder else 0
    path = Path(held.path)
    nearest_first = sorted(held.files, key=lambda name: name.count("/"), reverse=True)
    card = with_hub(read_cards(path.parents[depth - 1] if depth else path, nearest_first), hub)
    return Labels(card.licence, frozenset(card.tags))
