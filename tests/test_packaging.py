"""The built wheel carries what the application needs, and works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".")
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_migrations_manifests_and_zoo(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (
        ("migrations", "migrations"),
        ("catalog", "catalog"),
        ("examples/zoo/hub_router", "zoo/hub_router"),
    ):
        tracked = [
            path.relative_to(ROOT / folder)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
        assert tracked
        missing = [str(path) for path in tracked if f"hub_router/_bundled/{prefix}/{path}" not in inside]
        assert not missing
    assert not [name for name in inside if name.startswith("tests/")]


def test_installed_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site), "HUB_ROUTER_HOME": str(tmp_path / "home")}
    probe = "import hub_router.settings as s; print(s.__file__); print(s.bundled('migrations'), s.bundled('zoo'))"
    where = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    ).stdout
    assert where.count(str(site)) == 3, where
    for command in (["db", "upgrade"], ["list", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "hub_router", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_every_dependency_is_imported_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {
        "faiss-cpu": "faiss",
        "huggingface-hub": "huggingface_hub",
        "pyyaml": "yaml",
        "scikit-learn": "sklearn",
        "sentence-transformers": "sentence_transformers",
    }
    source = "\n".join(path.read_text() for path in (ROOT / "hub_router").rglob("*.py"))
    source += "\n".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / ".constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in project["dependencies"]:
        name = requirement.split(">=")[0]
        module = modules.get(name, name)
        assert f"import {module}" in source or f"from {module}" in source, f"{name} is installed but not used"
        assert name in pins, f"{name} is not pinned in .constraints.txt"
