"""kill -9 or Ctrl-C anywhere, then the same command: it goes on and chooses the same."""

import json
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.core.records import BuildChoice, Plan
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import (
    MEMORY,
    Accuracy,
    Finished,
    Recorded,
    after,
    kept_all,
    partial_files,
    parts,
    records,
    start,
    stop_when,
    warm_copy,
)

PROGRAM = """
import json, sys
import numpy as np
import tersor
from tests.conftest import DATA, pixels
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import brief_runs, parts
with np.load(DATA / "fashion_mnist_2k.npz") as packed:
    images = {"train": pixels(packed["train_images"]), "test": pixels(packed["test_images"])}
target = tersor.Target(size_ratio=3.0)
with brief_runs():
    result = tersor.compress(load_lenet5(), parts(images), target=target, cache_dir=sys.argv[1],
                             methods=("quantize",), backend="openvino")
print(json.dumps({"assignment": dict(result.plan.assignment),
                  "choice": result.plan.choice.describe()}))
"""
BEHIND_PRICES = ("looked", "evaluated", "measured", "plan", "transform", "verdict")


@dataclass(frozen=True)
class Kill:
    """When to kill a run, what the store lacks before it, and what must not be started again."""

    after: str  # the stage whose record is there
    lacking: tuple[str, ...]
    done: frozenset[str]


PROPOSED = frozenset({"calibrate", "propose", "errors"})
PRICED = PROPOSED | {"baseline", "price"}
KILLS = (
    Kill("calibration", ("propose", *BEHIND_PRICES), frozenset({"calibrate", "baseline", "price"})),
    Kill("propose", ("propose", *BEHIND_PRICES), PRICED),
    Kill("price", ("price", *BEHIND_PRICES), PRICED),
    Kill("measured", BEHIND_PRICES, PRICED),  # in the middle of planning
    Kill("plan", BEHIND_PRICES, PRICED),  # a larger one may follow; the record itself stays
)
SLOW = ("calibration", "propose", "price", "plan")  # each starts two processes: one is in every run


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def run_again(program: Path, cache: Path) -> tuple[dict[str, Any], list[str]]:
    """What the same command chooses in a new process, and the stages that it started."""
    out, err = (process := start(str(program), str(cache))).communicate(timeout=110)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found, re.findall(r"^tersor: (\w+)", err, re.MULTILINE)


def uninterrupted(cache: Path, folder: Path, images: dict[str, Tensor]) -> dict[str, Any]:
    """What a run chooses that solves the plan anew from the price records of a store."""
    other = folder / "other"
    shutil.copytree(cache, other)
    for name in ("plan", "transform", "verdict"):
        shutil.rmtree(other / name, ignore_errors=True)
    progress = Recorded()
    result = tersor.compress(
        load_lenet5(),
        parts(images),
        target=tersor.Target(size_ratio=3.0),
        cache_dir=other,
        progress=progress,
        methods=("quantize",),
    )
    assert "plan" in progress.stages
    assert not PRICED & set(progress.stages)
    return {"assignment": dict(result.plan.assignment), "choice": result.plan.choice.describe()}


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(k, id=k.after, marks=[pytest.mark.slow] if k.after in SLOW else [])
        for k in KILLS
    ],
)
def test_killed_after_a_stage(
    lenet_run: Finished, images: dict[str, Tensor], program: Path, tmp_path: Path, kill: Kill
) -> None:
    cache = warm_copy(lenet_run, tmp_path, kill.lacking)
    process = start(str(program), str(cache))
    stop_when(process, lambda: any((cache / kill.after).glob("[!.]*/record.json")), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = records(cache)
    assert any(name.startswith(f"{kill.after}/") for name in before)
    found, stages = run_again(program, cache)
    assert stages[-1] == "verify"
    assert not kill.done & set(stages)
    kept = records(cache)
    # Statistics go once they were used; builds are measured again where the machine's speed changed.
    removed = {name for name in before if name.startswith(("calibration/", *MEMORY))}
    assert {name: kept[name] for name in before if name not in removed} == {
        name: time for name, time in before.items() if name not in removed
    }
    assert partial_files(cache) == []
    assert uninterrupted(cache, tmp_path, images) == found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["capture", "calibrate", "errors", "baseline", "price", "plan"])
def test_killed_in_the_middle_of_a_stage(
    images: dict[str, Tensor], program: Path, tmp_path: Path, stage: str
) -> None:
    """From an empty store; what was finished before that stage is not done again."""
    cache = tmp_path / "cache"
    process = start(str(program), str(cache))
    assert process.stderr is not None
    seen = []
    while not seen or seen[-1] != stage:
        line = process.stderr.readline()
        assert line, seen
        seen += re.findall(r"^tersor: (\w+)", line)
    stop_when(process, lambda: True, signal.SIGKILL)
    before = records(cache)
    found, stages = run_again(program, cache)
    finished = set(seen[:-1]) - {"data", "capture", *(["propose"] if stage == "errors" else [])}
    assert not finished & set(stages)
    kept = records(cache)
    assert all(
        kept[n] == time for n, time in before.items() if not n.startswith(("calibration/", *MEMORY))
    )
    assert uninterrupted(cache, tmp_path, images) == found


@pytest.mark.parametrize(
    "stage",
    [
        "errors",
        "transform",
        pytest.param("calibrate", marks=pytest.mark.slow),
        pytest.param("price", marks=pytest.mark.slow),
    ],
)
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
            methods=("quantize",),
        )

    with pytest.raises(KeyboardInterrupt):
        compress(Recorded(stop_at=stage))
    assert partial_files(store) == []
    assert kept_all(before, records(store))
    assert compress(Recorded()).plan.assignment


class Residual(nn.Module):
    """Two blocks on one stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 4)
        self.first = nn.ModuleList(nn.Conv2d(16, 32, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(32, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, second in zip(self.first, self.second, strict=True):
            x = (x + second(first(x).relu())).relu()
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def test_a_cut_network_whose_additions_are_in_eight_bits_goes_on(tmp_path: Path) -> None:
    """Killed between its cut and its formats: the graph comes back from the store, with its shapes."""
    layers = ["stem", *(f"{part}.{i}" for i in range(2) for part in ("first", "second"))]
    plan = Plan(
        assignment={
            **dict.fromkeys([*layers, "add:add", "add:add_1"], "int8"),
            "width:first.0": 16,
        },
        methods={
            **dict.fromkeys([*layers, "add:add", "add:add_1"], "quantize"),
            "width:first.0": "prune",
        },
        choice=BuildChoice(backend="openvino", precision="f32"),
        predicted_ms=1.0,
        predicted_bytes=1,
        predicted_error=0.0,
        target={"min_agreement": 0.5},
    )
    rows = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = tersor.Data([rows], output="embedding")
    store = tmp_path / "store"

    def run() -> dict[str, bytes]:
        """What the store has of the formats; which build wins in the end goes by the clock."""
        tersor.apply_plan(Residual(), data, plan, cache_dir=store, progress=False)
        return {p.name: p.read_bytes() for p in (store / "transform").glob("*/*")}

    first = run()
    for stage in ("transform", "verdict"):
        shutil.rmtree(store / stage, ignore_errors=True)
    assert any((store / "narrow").iterdir())
    assert run() == first
    assert {"record.json", "arrays.safetensors"} <= first.keys()
