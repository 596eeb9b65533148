"""The layer rule, enforced by walking the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hub_router"

# What each layer may import from hub_router, besides itself and the ground that all may stand on.
GROUND = {
    "encoder",
    "errors",
    "features",
    "formats",
    "gaussian",
    "names",
    "progress",
    "prototypes",
    "records",
    "settings",
}
ENGINE = {"lora", "routing", "composition", "training", "evaluate", "ewora"}
CATALOG = {"store", "sync", "search"}
ALLOWED = {
    "encoder": {"errors", "progress", "settings"},
    "errors": set(),
    "features": {"gaussian", "records"},
    "formats": set(),
    "gaussian": {"errors"},
    "names": set(),
    "progress": set(),
    "prototypes": {"errors", "records"},
    "records": set(),
    "settings": {"errors"},
    "store": GROUND,
    "sync": GROUND | {"store"},
    "search": GROUND | {"store"},
    "ewora": GROUND,
    "lora": GROUND,
    "routing": GROUND | {"lora"},
    "composition": GROUND | {"lora", "routing"},
    "evaluate": GROUND | {"composition", "routing", "lora"},
    "training": GROUND | {"composition", "routing", "lora"},
    "hub": GROUND | ENGINE | CATALOG,
    "doctor": GROUND | CATALOG,
    "demo": GROUND | {"hub", "cli"},
    "cli": GROUND | {"hub", "doctor", "demo"},
    "__init__": GROUND | {"hub", "composition"},
    "__main__": {"cli"},
}
HEAVY = ("torch", "transformers", "faiss", "sentence_transformers", "peft", "huggingface_hub", "sqlalchemy")


def layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def reachable(layer: str) -> set[str]:
    """All layers below one, step by step."""
    found, waiting = set(), [layer]
    while waiting:
        for below in ALLOWED[waiting.pop()] - found:
            found.add(below)
            waiting.append(below)
    return found


def imported_layers(tree: ast.AST) -> set[str]:
    """Layers of hub_router imported anywhere under a node, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "hub_router" and len(part) > 1}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def split_type_only(tree: ast.Module) -> tuple[ast.Module, ast.Module]:
    """A module without its ``if TYPE_CHECKING:`` blocks, and those blocks."""
    guarded = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    rest = [node for node in tree.body if node not in guarded]
    return ast.Module(body=rest, type_ignores=[]), ast.Module(body=guarded, type_ignores=[])


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_the_layers_below(path: Path) -> None:
    layer = layer_of(path)
    runtime, type_only = split_type_only(ast.parse(path.read_text()))
    forbidden = imported_layers(runtime) - ALLOWED[layer] - {layer}
    # Annotations may name what a lower layer hands up, however many steps below it was made.
    forbidden |= imported_layers(type_only) - reachable(layer) - {layer}
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
