"""What the end-to-end tests share: finished runs, recorders, and commands in processes."""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.result import Result
from tersor.api.session import pick_methods as picked
from tersor.core.records import BackendInfo, Level
from tersor.graph.contracts import Method
from tersor.graph.low_bits import LOW_BITS
from tersor.price.price import PriceConfig
from tersor.timing.protocol import Protocol

ROOT = Path(__file__).parents[2]
# In the order in which they finish; "measured" grows while the plan is made.
STAGES = ("calibration", "propose", "baseline", "price", "plan", "transform", "verdict")
N_TEST = 40
MEMORY = ("builds/", "tables/")  # what prices remember of earlier sessions
LOOKS = "looked/"  # losses of a plan on some batches: other prices may want it on more of them


@dataclass
class Recorded:
    """A progress that remembers; ``stop_at`` interrupts a stage as Ctrl-C would."""

    stop_at: str = ""
    stages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    closed: int = 0

    def stage(self, name: str, total: int | None = None) -> None:
        del total
        self.stages.append(name)

    def advance(self, steps: int = 1) -> None:
        self.steps += steps
        if self.stages[-1] == self.stop_at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Accuracy:
    """Share of right labels; remembers with what it was called."""

    images: Tensor
    labels: Tensor
    predictors: list[Any] = field(default_factory=list)

    def __call__(self, predict: Callable[[Tensor], Tensor]) -> float:
        self.predictors.append(predict)
        return float((predict(self.images).argmax(1) == self.labels).double().mean())


@dataclass(frozen=True)
class Finished:
    """One finished ``compress`` and everything that went into it."""

    model: nn.Module
    before: dict[str, Tensor]  # the model's state before the run
    data: tersor.Data
    metric: Accuracy | None
    test_metric: Accuracy | None
    progress: Recorded
    cache: Path
    result: Result
    uses_of_test_metric: int  # while compress ran

    def predict(self, x: Tensor) -> Tensor:
        """The original on a copy in evaluation mode: the given model stays as it is."""
        with torch.no_grad():
            found: Tensor = copy.deepcopy(self.model).eval()(x)
        return found


BRIEF = Protocol(rounds=3, runs=3, max_seconds=3.0)
FEW_BUILDS = PriceConfig(k=6, k_mixed=8, held_out=2)


def picked_for_speed(
    wanted: str | Sequence[str], infos: Sequence[BackendInfo], *, for_size: bool = False
) -> dict[str, Method]:
    """The methods without low bits, also under a size."""
    del for_size
    return picked(wanted, infos)


@contextmanager
def brief_runs(
    config: PriceConfig = FEW_BUILDS, *, low_bits: Collection[Level] = ()
) -> Iterator[None]:
    """Few builds, each measured briefly: what these tests are about is not how long a call takes.

    In float32 wherever they run: some processors compute in bf16 as well, where results are rounded more
    and other builds are on offer.

    Rounding every layer to 4, 3 and 2 bits takes longer than all the rest of such a run: only runs
    that are about these levels offer them. Runs without may last a session, so that they leave the
    table of levels alone, which unit tests read.
    """
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("openvino") is not None:
            from tersor.backends.openvino import executable

            able = [name for name in executable.capabilities() if name != "BF16"]
            patch.setattr(executable, "capabilities", lambda _="cpu": tuple(able))
        if low_bits:
            for method in ("quantize", "datafree"):  # imported here if not before: with every level
                patch.setattr(f"tersor.methods.{method}.LOW_BITS", LOW_BITS)
            offered = {level: bits for level, bits in LOW_BITS.items() if level in low_bits}
            patch.setattr("tersor.graph.low_bits.LOW_BITS", offered)
        patch.setattr("tersor.api.session.pick_methods", picked if low_bits else picked_for_speed)
        patch.setattr("tersor.api.stages.PriceConfig", lambda seed: replace(config, seed=seed))
        for name in ("stages._QUICK", "stages._CAREFUL", "stages.PRICING"):
            patch.setattr(f"tersor.api.{name}", BRIEF)
        for name in ("shaping._CURVE", "shaping._RACE"):
            patch.setattr(f"tersor.api.{name}", BRIEF)
        for name in ("choosing._FINALISTS", "judging._FINAL", "undoing._SIDE_BY_SIDE"):
            patch.setattr(f"tersor.api.{name}", BRIEF)
        patch.setattr("tersor.train.pricing._FINAL", BRIEF)
        patch.setattr(
            "tersor.api.result.BUSY", math.inf
        )  # three rounds on a busy machine are noisy
        yield


@contextmanager
def quick_runs(config: PriceConfig, *, low_bits: Collection[Level] = ()) -> Iterator[None]:
    """Brief runs with no baseline in the result's place."""
    with brief_runs(config, low_bits=low_bits), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.result.is_slower", lambda _: False)
        yield


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def parts(images: dict[str, Tensor]) -> tersor.Data:
    """60 images to calibrate with, 40 to search on, 40 to test on; one class an output."""
    train, test = images["train"], images["test"]
    return tersor.Data(
        calibration=[train[:60]], search=[train[60:100]], test=[test[:N_TEST]], output="logits"
    )


def warm_copy(run: Finished, folder: Path, without: Sequence[str] = ()) -> Path:
    """A copy of a run's store, in which some stages are not finished."""
    copy = folder / "warm"
    shutil.copytree(run.cache, copy)
    for stage in without:
        shutil.rmtree(copy / stage, ignore_errors=True)
    return copy


def after(stage: str) -> tuple[str, ...]:
    """A stage and those behind it."""
    return (*STAGES[STAGES.index(stage) :], *(("measured",) if stage != "verdict" else ()))


def records(store: Path) -> dict[str, int]:
    """Every record in a store, with the time of its last change."""
    found = sorted(store.glob("*/[!.]*/record.json"))  # a name with a dot is being written
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in found}


def kept_all(
    before: dict[str, int], after: dict[str, int], *, is_priced_again: bool = False
) -> bool:
    """Whether no stage was done again; builds are, where the machine's speed has changed by much.

    ``is_priced_again``: prices were measured once more, so that looks may have grown.
    """

    def is_kept(name: str, time: int) -> bool:
        if is_priced_again and name.startswith(LOOKS):
            return after.get(name, 0) >= time
        return after.get(name) == time

    return all(is_kept(*record) for record in before.items() if not record[0].startswith(MEMORY))


def partial_files(folder: Path) -> list[str]:
    """What an interrupted or refused write would leave behind."""
    hidden = [p for p in folder.rglob("*") if any(part.startswith(".") for part in p.parts[-2:])]
    entries = [p for p in folder.glob("*/*") if p.is_dir() and not (p / "record.json").is_file()]
    return sorted({str(p.relative_to(folder)) for p in (*hidden, *entries) if folder in p.parents})


def environment() -> dict[str, str]:
    """Of a child process: one thread, this checkout."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def start(*words: str) -> "subprocess.Popen[str]":
    """A Python process with this checkout; its streams are read by ``communicate``."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_when(
    process: "subprocess.Popen[str]", ready: Callable[[], bool], number: signal.Signals
) -> tuple[str, str]:
    """Send a signal as soon as something is there; returns both streams."""
    end = time.monotonic() + 90
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"it ended before the signal: {process.returncode}\n{out}\n{err}")
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=60)


def error_of(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Normalised squared error, the largest of all outputs."""
    errors = [
        float((f.double() - w.double()).square().sum() / w.double().square().sum())
        for f, w in zip(found, wanted, strict=True)
    ]
    return max(errors)


def same_class(found: Tensor, wanted: Tensor) -> float:
    """Share of samples with the same largest output."""
    return float((found.argmax(1) == wanted.argmax(1)).double().mean())


def close_logits(found: Tensor, wanted: Tensor) -> bool:
    """Two forms of one quantised graph: few values fall on the other side of a rounding.

    A flip moves one activation by one of 255 steps; a squared error of 1e-3 is what some hundred
    flips among the thousands of activations of these networks make. Where additions are rounded
    too, more roundings follow each other and OpenVINO skips some: up to 2e-3 was seen, with builds
    no further from the original than their graphs. Classes are compared where one leads by more
    than that moves.
    """
    best = wanted.topk(2, dim=1).values
    leads = best[:, 0] - best[:, 1] > 0.2 * wanted.std()
    is_same = same_class(found[leads], wanted[leads]) >= 0.97 if leads.any() else True
    return error_of([found], [wanted]) <= 5e-3 and is_same


def tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)
