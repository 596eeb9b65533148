"""``python -m hub_router`` is ``hub-router``."""

from __future__ import annotations

from hub_router.cli import main

if __name__ == "__main__":
    main()
