"""What holds for all tests: no token, no catalog of the developer's, no telemetry, nothing outside this machine."""

from __future__ import annotations

import os

# huggingface_hub reads its variables once, when it is imported.
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "NO_PROXY": "*",
}
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HUB_ROUTER_HOME", "HUB_ROUTER_DATABASE_URL"):
    os.environ.pop(name, None)
