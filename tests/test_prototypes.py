"""The file of a prototype set: what comes back, what is refused; and the cosines between two sets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from hub_router.errors import ArtifactError, HubRouterError
from hub_router.prototypes import (
    PrototypeMember,
    Prototypes,
    cosines,
    mean_cosine,
    prototype_faults,
    read_prototypes,
    write_prototypes,
)

KEY = "hub_router.prototypes"
WIDTHS = {"layers.10.q": 4, "layers.2.q": 4, "layers.2.down": 7}


def member(name: str, seed: int, modules: tuple[str, ...] = tuple(WIDTHS), **changes: np.ndarray) -> PrototypeMember:
    generator = np.random.default_rng(seed)
    vectors = {module: generator.standard_normal(WIDTHS[module]).astype(np.float32) for module in modules}
    return PrototypeMember(name, f"{seed:064x}", {**vectors, **changes})


@pytest.fixture
def gates() -> Prototypes:
    return Prototypes(
        method="maple",
        base_model="org/base",
        members=(member("org/a", 1), member("/folders/of mine/b", 2, ("layers.2.down",)), member("ç/d", 3)),
        parent="arrow",
        hyperparameters={"top_k": 4, "lr": 1e-4, "mask": True, "layers": [1, 2]},
        metrics={"loss": [2.5, 0.5], "note": "fine"},
        data_hash="d" * 64,
        seed=7,
    )


def document(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        return dict(json.loads(file.metadata()[KEY]))


def put(path: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> None:
    """A file with other tensors, or with a header that differs; None takes a field away."""
    with safe_open(path, framework="np") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = {name: value for name, value in {**document(path), **changes}.items() if value is not None}
    save_file(kept if tensors is None else tensors, path, metadata={KEY: json.dumps(fields)})


def test_everything_comes_back(gates: Prototypes, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    write_prototypes(path, gates)
    found = read_prototypes(path)
    for name in ("method", "base_model", "parent", "hyperparameters", "metrics", "data_hash", "seed"):
        assert getattr(found, name) == getattr(gates, name)
    assert [(one.name, one.weights_hash) for one in found.members] == [
        (one.name, one.weights_hash) for one in gates.members
    ]
    for got, given in zip(found.members, gates.members, strict=True):
        assert got.vectors.keys() == given.vectors.keys()
        for module, vector in given.vectors.items():
            assert got.vectors[module].dtype == np.float32
            np.testing.assert_array_equal(got.vectors[module], vector)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_given_stays_empty(tmp_path: Path) -> None:
    write_prototypes(tmp_path / "x", Prototypes("phatgoose", "org/base", (member("a", 1),)))
    found = read_prototypes(tmp_path / "x")
    assert (found.parent, found.hyperparameters, found.metrics, found.data_hash, found.seed) == ("", {}, {}, "", None)


def test_equal_sets_give_equal_bytes_with_the_usual_permissions(gates: Prototypes, tmp_path: Path) -> None:
    for name in "xyz":
        write_prototypes(tmp_path / name, gates)
    write_prototypes(tmp_path / "x", gates)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    (tmp_path / "plain").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_views_and_strides_are_written_as_they_read(tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_prototypes(
        tmp_path / "x", Prototypes("m", "b", (PrototypeMember("a", "w", {"p": table[:, 1], "q": table[1]}),))
    )
    found = read_prototypes(tmp_path / "x").members[0].vectors
    assert (found["p"].tolist(), found["q"].tolist()) == ([1, 5, 9], [4, 5, 6, 7])


def test_only_an_older_set_is_replaced(gates: Prototypes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_prototypes(path, gates)
    put(path, version=99)
    write_prototypes(path, replace(gates, seed=8))
    assert read_prototypes(path).seed == 8
    save_file({"w": np.ones(2, dtype=np.float32)}, tmp_path / "adapter", metadata={"format": "pt"})
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    kept = {name: (tmp_path / name).read_bytes() for name in ("adapter", "diary")}
    for name in ("adapter", "diary", "folder", "dangling"):
        with pytest.raises(ArtifactError, match=f"{name} holds something that is no prototype set"):
            write_prototypes(tmp_path / name, gates)
    assert sorted(tmp_path.iterdir()) == before
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())


def test_a_folder_that_is_not_there_is_named(gates: Prototypes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{tmp_path / 'no'} is no folder"):
        write_prototypes(tmp_path / "no" / "x", gates)


# A limit on the size of files stands for a full disk.
FULL = """
import resource, signal, sys
from dataclasses import replace
from pathlib import Path
from hub_router.prototypes import read_prototypes, write_prototypes
path = Path(sys.argv[1])
prototypes = replace(read_prototypes(path), seed=8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    write_prototypes(path, prototypes)
except OSError as error:
    print(error.strerror)
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(gates: Prototypes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_prototypes(path, gates)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_every_fault_of_a_set_is_named_at_once(gates: Prototypes, tmp_path: Path) -> None:
    wrong = replace(
        gates,
        method="",
        parent="x" * 65,
        base_model="two\nlines",
        data_hash=None,  # type: ignore[arg-type]
        seed=-1,
        hyperparameters={"lr": math.nan},
        metrics={"loss": np.float32(1)},
        members=(
            member("a", 1, **{"layers.2.q": np.array([1, math.inf, math.nan, 0], dtype=np.float32)}),
            member("a", 2, **{"layers.2.q": np.ones(4)}),
            PrototypeMember("b", "", {}),
            PrototypeMember("c", "w", {"": np.ones((2, 2), dtype=np.float32), "m": np.ones(0, dtype=np.float32)}),
        ),
    )
    lines = prototype_faults(wrong)
    expected = (
        "method: got ''",
        "base_model: got 'two\\nlines'",
        "parent: got 'xxx",
        "data_hash: got None",
        "hyperparameters: got {'lr': nan}",
        "metrics: got {'loss'",
        "seed: got -1",
        "member 'a' occurs 2 times",
        "member 'a', module layers.2.q: 2 of 4 numbers are not finite",
        "member 'a', module layers.2.q: got float64 (4,), expected a vector (D,) of float32",
        "member 'b', weights_hash: got ''",
        "member 'b' has no vectors",
        "member 'c', name of a module: got ''",
        "member 'c', module : got float32 (2, 2)",
        "member 'c', module m: got float32 (0,)",
    )
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start), (line, start)
    with pytest.raises(ArtifactError, match="cannot be written") as caught:
        write_prototypes(tmp_path / "x", wrong)
    assert all(start in str(caught.value) for start in expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [True, 1.0, 2**31, "1"])
def test_seeds_that_the_catalog_cannot_hold(gates: Prototypes, seed: Any) -> None:
    assert prototype_faults(replace(gates, seed=seed)) == [
        f"seed: got {seed!r}, expected a whole number from 0 to 2147483647, or none"
    ]


def test_one_module_has_one_length(gates: Prototypes) -> None:
    other = member("z", 4, **{"layers.2.q": np.ones(5, dtype=np.float32)})
    assert prototype_faults(replace(gates, members=(*gates.members, other))) == [
        "module layers.2.q: vectors of lengths 4 (org/a), 5 (z), expected one length"
    ]
    assert prototype_faults(replace(gates, members=())) == ["members: got none, expected at least one adapter"]


ONE = np.ones(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"version": 2}, ["is of version 2, expected 1", "pip install --upgrade hub-router"]),
        ({"version": None}, ["is of version None, expected 1"]),
        ({"members": None, "seed": None}, ["its header has no 'seed'", "its header has no 'members'"]),
        ({"members": "all"}, ["members: got 'all', expected a list of objects"]),
        ({"members": [["a"], "b"]}, ["members: got [['a'], 'b'], expected a list of objects"]),
        ({"members": []}, ["belongs to no member"]),
        ({"members": [{"name": "a", "weights_hash": "w"}] * 3}, ["member 'a' occurs 3 times"]),
        ({"members": [{"name": ["a"], "weights_hash": "w"}, {}, {}]}, ["got ['a'], expected text", "got None"]),
        ({"members": [{"name": n, "weights_hash": 5} for n in "abc"]}, ["member 'a', weights_hash: got 5"]),
        ({"method": 5, "base_model": ["x"]}, ["method: got 5", "base_model: got ['x']"]),
        ({"base_model": "\ud800"}, ["base_model: got '\\ud800'"]),
        ({"hyperparameters": [1], "metrics": {"loss": math.inf}}, ["hyperparameters: got [1]", "metrics: got"]),
        ({"seed": "7"}, ["seed: got '7'"]),
        ({"tensors": {}}, ["member 'org/a' has no vectors", "member 'ç/d' has no vectors"]),
        ({"tensors": dict.fromkeys(("3/m", "-1/m", "00/m", "m", "²/m"), ONE)}, ["tensor '3/m' belongs to no", "'²/m'"]),
        ({"tensors": {"0/": ONE, "1/m": ONE, "2/m": ONE}}, ["name of a module: got ''"]),
        ({"tensors": {"0/m": ONE.astype(np.float16)}}, ["tensor '0/m': got F16 (4,), expected a vector (D,) of F32"]),
        ({"tensors": {"0/m": ONE.reshape(2, 2)}}, ["tensor '0/m': got F32 (2, 2)"]),
        ({"tensors": {"0/m": np.array(1, dtype=np.float32)}}, ["tensor '0/m': got F32 ()"]),
        ({"tensors": {f"{i}/m": ONE * math.nan for i in range(3)}}, ["member 'org/a', module m: 4 of 4 numbers"]),
        ({"tensors": {f"{i}/m": np.ones(i + 1, np.float32) for i in range(3)}}, ["module m: vectors of lengths 1"]),
        ({"tensors": {f"{i}/{'m' * 600}": ONE for i in range(3)}}, ["expected printable text of 1 to 512"]),
        ({"tensors": {f"x/{i}": ONE for i in range(500)}}, ["and 480 more"]),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_error(
    gates: Prototypes, tmp_path: Path, changes: dict[str, Any], texts: list[str]
) -> None:
    path = tmp_path / "x"
    write_prototypes(path, gates)
    put(path, **changes)
    with pytest.raises(ArtifactError) as caught:
        read_prototypes(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is ")
    assert len(message) < 10_000
    for text in texts:
        assert text in message


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", "null", '"x"', "1" * 5000, '{"version": 1}'])
def test_a_header_that_is_no_such_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    save_file({"0/m": ONE}, path, metadata={KEY: text})
    with pytest.raises(ArtifactError, match=str(path)):
        read_prototypes(path)


def test_files_of_other_kinds(gates: Prototypes, tmp_path: Path) -> None:
    write_prototypes(tmp_path / "whole", gates)
    whole = (tmp_path / "whole").read_bytes()
    save_file({"0/m": ONE}, tmp_path / "adapter", metadata={"format": "pt"})
    save_file({"0/m": ONE}, tmp_path / "bare")
    contents = {
        "empty": b"",
        "short": whole[:50],
        "cut": whole[:-1],
        "longer": whole + b"x",
        "text": b"<html>not found</html>" * 20,
        "huge": (2**63).to_bytes(8, "little") + whole[8:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in (*contents, "adapter", "bare", "folder", "absent"):
        with pytest.raises(ArtifactError) as caught:
            read_prototypes(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "expected a prototype set as hub-router prototypes export writes it" in str(caught.value)


def test_cosines_equal_a_loop_in_float64(gates: Prototypes) -> None:
    others = (member("ç/d", 9), member("org/a", 8, ("layers.2.q", "layers.10.q")), member("else", 7))
    parent = replace(gates, members=others)
    for signed in (True, False):
        found = cosines(gates, parent, signed=signed)
        assert [module.module for module in found] == ["layers.2.down", "layers.2.q", "layers.10.q"]
        every = []
        for module in found:
            expected = []
            for own in gates.members:
                for other in others:
                    if own.name == other.name and module.module in other.vectors and module.module in own.vectors:
                        a, b = own.vectors[module.module].tolist(), other.vectors[module.module].tolist()
                        dot = sum(x * y for x, y in zip(a, b, strict=True))
                        cosine = dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
                        expected.append(cosine if signed else abs(cosine))
            assert module.shared == len(expected) == {"layers.2.down": 1}.get(module.module, 2)
            assert module.mean == pytest.approx(sum(expected) / len(expected), rel=1e-12)
            assert module.min == pytest.approx(min(expected), rel=1e-12)
            every += expected
        assert mean_cosine(found) == pytest.approx(sum(every) / len(every), rel=1e-12)


def test_cosines_of_the_same_opposite_and_zero_vectors(gates: Prototypes) -> None:
    assert all(module.mean == pytest.approx(1) and module.min == pytest.approx(1) for module in cosines(gates, gates))
    opposite = [replace(one, vectors={m: -v for m, v in one.vectors.items()}) for one in gates.members]
    turned = replace(gates, members=tuple(opposite))
    assert mean_cosine(cosines(gates, turned)) == pytest.approx(-1)
    assert mean_cosine(cosines(gates, turned, signed=False)) == pytest.approx(1)
    zeros = [replace(one, vectors={m: 0 * v for m, v in one.vectors.items()}) for one in gates.members]
    assert cosines(gates, replace(gates, members=tuple(zeros))) == ()
    large = [replace(one, vectors={m: 1e30 * v for m, v in one.vectors.items()}) for one in gates.members]
    assert mean_cosine(cosines(replace(gates, members=tuple(large)), gates)) == pytest.approx(1)


def test_sets_of_different_widths_are_refused(gates: Prototypes) -> None:
    wide = {module: np.ones(9, dtype=np.float32) for module in WIDTHS}
    other = replace(gates, members=(PrototypeMember("org/a", "w", wide),))
    with pytest.raises(HubRouterError) as caught:
        cosines(gates, other)
    for module, width in WIDTHS.items():
        assert f"adapter 'org/a', module {module}: shapes ({width},) and (9,)" in str(caught.value)
