from __future__ import annotations

import pytest

from hub_router.errors import SettingsError
from hub_router.store.engine import open_engine, parse_url, shown, sqlite_file


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///file:catalog?mode=memory&uri=true", "sqlite+aiosqlite:////c.db"],
)
def test_sqlite_that_cannot_be_shared_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"expected sqlite:////absolute/path/catalog\.db"):
        parse_url(url)


@pytest.mark.parametrize("url", ["catalog.db", "", "/home/me/catalog.db", "postgresql://host:port/name"])
def test_text_that_is_no_url(url: str) -> None:
    with pytest.raises(SettingsError, match="--database-url or HUB_ROUTER_DATABASE_URL"):
        parse_url(url)


def test_unknown_database() -> None:
    with pytest.raises(SettingsError, match="no driver for the database URL nosuchdb://host/name"):
        open_engine(parse_url("nosuchdb://host/name"))


def test_password_is_never_shown() -> None:
    url = parse_url("postgresql://me:secret@host/name")
    assert "secret" not in shown(url)
    assert sqlite_file(url) is None
