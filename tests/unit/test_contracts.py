"""Negative control of the import contracts: a planted violation must turn ``lint-imports`` red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "tersor"
LAYERS = "One-way layers; stages and plug-in families do not know each other"
PLUGINS = "A method does not know another method; a backend does not know another backend"
NO_TORCH = "What plans, loads, runs and reports needs no torch"
OWN_BACKEND = "Backend packages are touched only by their own backend"
CONTRACTS = (LAYERS, PLUGINS, NO_TORCH, OWN_BACKEND)


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """The folders of the real package with empty modules, and the real configuration."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src" / "tersor"
    package.mkdir(parents=True)
    for folder in (p.parent.name for p in PACKAGE.glob("*/__init__.py")):
        plant(package, f"{folder}/__init__.py")
    for name in ("__init__.py", "api.py", "_version.py", "core/errors.py"):
        plant(package, name)
    for name in ("a", "b"):
        plant(package, f"methods/{name}.py")
        plant(package, f"backends/{name}.py")
    return package


def plant(package: Path, name: str, line: str = "") -> None:
    path = package / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n", encoding="utf-8")


def lint(package: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--config", "pyproject.toml", "--no-cache"],
        cwd=package.parents[1],
        env={**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def broken(output: str) -> set[str]:
    """The contracts that the summary calls broken; every contract must be in it."""
    summary = {c: next(x for x in output.splitlines() if x.startswith(c)) for c in CONTRACTS}
    words = {c: line.removeprefix(c).split()[0] for c, line in summary.items()}
    assert set(words.values()) <= {"KEPT", "BROKEN"}
    return {c for c, word in words.items() if word == "BROKEN"}


def test_a_clean_skeleton_is_green(skeleton: Path) -> None:
    plant(skeleton, "backends/a.py", "import openvino")
    plant(skeleton, "capture/module.py", "import torch\nfrom tersor.graph import x\n")
    plant(skeleton, "graph/x.py")
    plant(skeleton, "plan/x.py", "from tersor.core import errors")
    done = lint(skeleton)
    assert done.returncode == 0, done.stdout + done.stderr
    assert broken(done.stdout) == set()


@pytest.mark.parametrize(
    ("name", "line", "contract"),
    [
        ("plan/x.py", "import torch", NO_TORCH),
        ("core/x.py", "import torch", NO_TORCH),
        ("report/x.py", "import torch", NO_TORCH),
        ("runtime/x.py", "import torch", NO_TORCH),
        ("methods/a.py", "from tersor.methods import b", PLUGINS),
        ("backends/a.py", "from tersor.backends import b", PLUGINS),
        ("plan/x.py", "from tersor import price", LAYERS),
        ("report/x.py", "from tersor import analyse", LAYERS),
        ("price/x.py", "from tersor.methods import a", LAYERS),
        ("core/x.py", "from tersor import ops", LAYERS),
        ("capture/x.py", "from tersor import api", LAYERS),
        ("utils/__init__.py", "", LAYERS),  # a folder that no layer names
        ("core/x.py", "import openvino", OWN_BACKEND),
        ("verify/x.py", "import onnxruntime", OWN_BACKEND),
        ("cli/x.py", "import openvino", OWN_BACKEND),
    ],
)
def test_a_planted_violation_turns_its_contract_red(
    skeleton: Path, name: str, line: str, contract: str
) -> None:
    plant(skeleton, name, line)
    done = lint(skeleton)
    assert done.returncode != 0
    assert broken(done.stdout) == {contract}
