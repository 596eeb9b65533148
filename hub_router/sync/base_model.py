"""From the base model that an adapter names to a Hub id.

Adapters are often trained from a local copy, so ``base_model_name_or_path`` may be an id, a path into the Hub cache
from which the id can be read, or a path that says nothing; then the card is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hub_router.sync.targets import is_repo_id

_CACHE = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?:[/\\]|$)")
_BARE = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_base_model(stated: str | None, card: Sequence[str] = ()) -> str | None:
    """The Hub id of an adapter's base model.

    Args:
        stated (str | None): ``base_model_name_or_path`` as written in adapter_config.json.
        card (Sequence[str]): ``base_model`` of the card.

    Returns:
        str | None: ``owner/name`` (or the bare name of an old canonical model); None where neither source names one.
    """
    text = (stated or "").strip()
    cached = _CACHE.search(text)
    if cached and is_repo_id(f"{cached[1]}/{cached[2]}"):
        return f"{cached[1]}/{cached[2]}"
    if is_repo_id(text):
        return text
    named = [name for name in card if is_repo_id(name)]
    if named:
        return named[0]
    return text if _BARE.fullmatch(text) else None
