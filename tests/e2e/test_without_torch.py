"""Artifacts run where there is no torch: in a process that can't import it, and in an environment
that does not have it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tests.e2e.helpers import ROOT, Finished, environment

PROGRAM = textwrap.dedent(
    """
    import sys
    if "block" in sys.argv:
        sys.modules["torch"] = None
    import numpy as np
    import tersor
    runner = tersor.load(sys.argv[1])
    given = np.load(sys.argv[2])
    found = runner(given["images"])
    assert type(found) is np.ndarray, type(found)
    assert np.array_equal(found, given["wanted"]), abs(found - given["wanted"]).max()
    assert "torch" not in sys.modules or sys.modules["torch"] is None
    try:
        tersor.compress(None, None, target="2x")
    except tersor.TersorError as error:
        print(type(error).__name__, error)
    """
)


@pytest.fixture
def given(lenet_run: Finished, images: dict[str, Tensor], tmp_path: Path) -> Path:
    """Images and what the result makes of them."""
    path = tmp_path / "given.npz"
    batch = images["test"][:7]
    np.savez(path, images=batch.numpy(), wanted=lenet_run.result.model(batch.numpy()))
    return path


def test_an_artifact_runs_where_torch_can_not_be_imported(
    lenet_file: Path, given: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, lenet_file, given, "block"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'tersor[compress]'" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_artifact_runs_in_an_environment_without_torch(
    lenet_file: Path, given: Path, tmp_path: Path
) -> None:
    home = tmp_path / "plain"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, f"{ROOT}[openvino]"], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list"], check=True, capture_output=True, text=True
    ).stdout
    assert "torch " not in listed
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [python, program, lenet_file, given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MissingDependencyError" in done.stdout
    assert "pip install 'tersor[compress]'" in done.stdout
    inputs, outputs = tmp_path / "in.npz", tmp_path / "out.npz"
    with np.load(given) as arrays:
        wanted = arrays["wanted"]
        np.savez(inputs, arrays["images"])
    command = [home / "bin" / "tersor", "run", lenet_file, inputs, "--out", outputs]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(outputs) as found:
        assert np.array_equal(next(iter(found.values())), wanted)
