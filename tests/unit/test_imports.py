"""What an import loads: ``import tersor`` and the command line must stay light."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "openvino", "onnx", "onnxruntime", "onnxscript", "scipy", "nncf", "transformers")


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after running ``code``."""
    show = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "tersor",
        "tersor.cli.main",
        "tersor.report.terminal",
        "tersor.report.form",
        "tersor.report.explain",
        "tersor.analyse.doctor",
    ],
)
def test_loads_no_framework_and_no_backend(module: str) -> None:
    found = loaded_after(f"import {module}")
    assert "tersor" in found
    assert not found & set(HEAVY)


def test_import_tersor_loads_nothing_but_itself_and_the_standard_library() -> None:
    extra = loaded_after("import tersor") - loaded_after("pass") - {"tersor"}
    assert extra <= set(sys.stdlib_module_names)


def test_the_check_would_see_a_heavy_import() -> None:
    assert "scipy" in loaded_after("import scipy")
