"""Paths and environment, read once.

``HUB_ROUTER_HOME`` and ``HUB_ROUTER_DATABASE_URL`` belong to this application; ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME`` and ``HF_HUB_OFFLINE`` are left to huggingface_hub, which reads them itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hub_router.errors import SettingsError

# The sentence encoder where none is named; here, because to import what loads it takes seconds.
DEFAULT_ENCODER = "hkunlp/instructor-base"


@dataclass(frozen=True)
class Settings:
    """Where this installation keeps its data.

    Args:
        home (Path): folder of the catalog; holds the SQLite file and the FAISS caches.
        database_url (str): SQLAlchemy URL of the catalog database.
    """

    home: Path
    database_url: str

    @property
    def index_dir(self) -> Path:
        """Folder of the FAISS files, which are caches and may be deleted."""
        return self.home / "faiss"

    @classmethod
    def resolve(cls, home: str | Path | None = None, database_url: str | None = None) -> Settings:
        """Settings from arguments, else the environment, else the defaults.

        Args:
            home (str | Path | None): overrides ``HUB_ROUTER_HOME``; default ``~/.hub_router``.
            database_url (str | None): overrides ``HUB_ROUTER_DATABASE_URL``; default SQLite inside the home.

        Returns:
            Settings: absolute paths; nothing is created on disk.

        Raises:
            SettingsError: the home exists and is not a folder.
        """
        chosen = Path(home or os.environ.get("HUB_ROUTER_HOME") or "~/.hub_router").expanduser().absolute()
        if chosen.exists() and not chosen.is_dir():
            raise SettingsError(f"home {chosen} is a file, expected a folder; choose another with --home DIR")
        url = database_url or os.environ.get("HUB_ROUTER_DATABASE_URL") or f"sqlite:///{chosen / 'catalog.db'}"
        return cls(home=chosen, database_url=url)


def bundled(name: str) -> Path:
    """Folder of data shipped with the application: ``migrations``, ``catalog`` or ``zoo``.

    A wheel carries them inside the package; a source checkout has them at its top level.

    Args:
        name (str): one of the three names above.

    Returns:
        Path: an existing folder.

    Raises:
        SettingsError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    in_checkout = {"zoo": "examples/zoo"}.get(name, name)
    for folder in (package / "_bundled" / name, package.parent / in_checkout):
        if folder.is_dir():
            return folder
    raise SettingsError(f"bundled data {name!r} not found beside {package}; reinstall with: pip install hub-router")
