"""kill -9 or Ctrl-C anywhere, then the same command: it goes on and chooses the same."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tersor
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import (
    Accuracy,
    Finished,
    Recorded,
    after,
    partial_files,
    parts,
    records,
    start,
    stop_when,
    warm_copy,
)

PROGRAM = """
import json, sys
import tersor
from tests.conftest import DATA, pixels
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import Recorded, parts
import numpy as np
with np.load(DATA / "fashion_mnist_2k.npz") as packed:
    images = {"train": pixels(packed["train_images"]), "test": pixels(packed["test_images"])}
progress = Recorded()
result = tersor.compress(load_lenet5(), parts(images), target=tersor.Target(size_ratio=3.0),
                         cache_dir=sys.argv[1], progress=progress)
print(json.dumps({"stages": progress.stages, "assignment": dict(result.plan.assignment),
                  "choice": result.plan.choice.describe()}))
"""

# What the killed run had finished -> what the second run must not start again.
FINISHED = {
    "propose": {"calibrate", "propose", "errors"},
    "price": {"calibrate", "propose", "errors", "baseline", "price"},
    "measured": {"calibrate", "propose", "errors", "baseline", "price"},  # within the plan
    "plan": {"calibrate", "propose", "errors", "baseline", "price", "plan"},
}


def run_again(program: Path, cache: Path) -> dict[str, Any]:
    out, err = (process := start(str(program), str(cache))).communicate(timeout=110)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize(
    "stage", ["price", *(pytest.param(s, marks=pytest.mark.slow) for s in ("propose", "plan"))]
)
def test_killed_after_a_stage(program: Path, tmp_path: Path, stage: str) -> None:
    cache = tmp_path / "cache"
    process = start(str(program), str(cache))
    stop_when(process, lambda: bool(list(cache.glob(f"{stage}/*/record.json"))), signal.SIGKILL)
    before = records(cache)
    assert any(name.startswith(f"{stage}/") for name in before)
    found = run_again(program, cache)
    assert not FINISHED[stage] & set(found["stages"])
    kept = records(cache)
    assert {name: kept[name] for name in before} == before
    assert partial_files(cache) == []
    # An uninterrupted run from the same price records chooses the same.
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    for name in ("plan", "transform", "verdict"):
        shutil.rmtree(other / name, ignore_errors=True)
    again = run_again(program, other)
    assert "plan" in again["stages"]
    assert (again["choice"], again["assignment"]) == (found["choice"], found["assignment"])


def test_killed_in_the_middle_of_calibration(program: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(str(program), str(cache))
    stop_when(process, cache.is_dir, signal.SIGKILL)
    assert not list(cache.glob("propose/*/record.json"))
    found = run_again(program, cache)
    assert found["assignment"]
    assert partial_files(cache) == []


@pytest.mark.parametrize("stage", ["errors", "transform"])
def test_interrupted_inside_a_stage(
    lenet_run: Finished, images: dict[str, Tensor], tmp_path: Path, stage: str
) -> None:
    assert lenet_run.metric is not None
    names = {
        "calibrate": "calibration",
        "errors": "propose",
        "price": "price",
        "transform": "transform",
    }
    store = warm_copy(lenet_run, tmp_path, after(names[stage]))
    before = records(store)

    def compress(progress: Recorded) -> Any:
        metric = Accuracy(lenet_run.metric.images, lenet_run.metric.labels)
        return tersor.compress(
            load_lenet5(),
            parts(images),
            target=lenet_run.result.target,
            metric=metric,
            cache_dir=store,
            progress=progress,
        )

    with pytest.raises(KeyboardInterrupt):
        compress(Recorded(stop_at=stage))
    assert partial_files(store) == []
    assert {k: v for k, v in records(store).items() if k in before} == before
    assert compress(Recorded()).plan.assignment
