"""The layer rule, enforced by walking the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hub_router"

# What each layer may import from hub_router, besides itself and the ground that all may stand on.
GROUND = {"errors", "progress", "records", "settings"}
ENGINE = {"lora", "routing", "compose", "evaluate"}
CATALOG = {"store", "sync", "search"}
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "records": set(),
    "settings": {"errors"},
    "store": GROUND,
    "sync": GROUND | {"store"},
    "search": GROUND | {"store"},
    "lora": GROUND,
    "routing": GROUND | {"lora"},
    "compose": GROUND | {"lora", "routing"},
    "evaluate": GROUND | {"compose", "routing", "lora"},
    "hub": GROUND | ENGINE | CATALOG,
    "doctor": GROUND | CATALOG,
    "demo": GROUND | {"hub", "cli"},
    "cli": GROUND | {"hub", "doctor", "demo"},
    "__init__": GROUND | {"hub", "compose"},
    "__main__": {"cli"},
}
HEAVY = ("torch", "transformers", "faiss", "sentence_transformers", "peft", "huggingface_hub", "sqlalchemy")


def layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_layers(path: Path) -> set[str]:
    """Layers of hub_router that a file imports anywhere, function bodies and type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import of {node.module}"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hub_router" and len(parts) > 1:
                found.add(parts[1])
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_the_layers_below(path: Path) -> None:
    layer = layer_of(path)
    known = {
        entry for entry in imported_layers(path) if (PACKAGE / entry).is_dir() or (PACKAGE / f"{entry}.py").exists()
    }
    forbidden = known - ALLOWED[layer] - {layer}
    assert not forbidden, f"{path.relative_to(PACKAGE)} ({layer}) must not import {sorted(forbidden)}"


def test_help_loads_no_heavy_library() -> None:
    probe = (
        "import sys\n"
        "from hub_router.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().splitlines()[-1] == "[]"


def test_public_names_are_lazy() -> None:
    probe = f"import sys, hub_router; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
