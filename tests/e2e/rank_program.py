"""What each rank of ``test_distributed`` runs: ``python -m tests.e2e.rank_program TASK FOLDER``.

Prints what it found as one line of JSON.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import tersor
from tersor.api.proposing import as_tensors, calibrate, propose
from tersor.api.session import Session, Settings, open_session
from tersor.core.errors import TersorError
from tersor.core.jsonable import to_json
from tersor.observe.keeping import pack
from tersor.observe.ranks import ALONE, RankGroup, joined
from tersor.price.price import PriceConfig
from tests.conftest import DATA, pixels
from tests.data.zoo import load_lenet5
from tests.e2e.conftest import TILES, Tiny
from tests.e2e.helpers import Recorded, parts, quick_runs

CONFIG = PriceConfig(k=4, held_out=2)
METHODS = ("quantize", "prune")
TARGET = tersor.Target(size_ratio=3.0)
RECOVER = tersor.Recover(steps=8, batch=16)


@contextmanager
def quick() -> Iterator[None]:
    """As the fixtures of this folder, in a process of its own."""
    with quick_runs(CONFIG), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.session.device_tiles", lambda *_: TILES)
        patch.setattr("tersor.api.session.backend_names", lambda: ["openvino"])
        yield


def images() -> dict[str, Tensor]:
    with np.load(DATA / "fashion_mnist_2k.npz") as packed:
        return {name: pixels(packed[f"{name}_images"]) for name in ("train", "test")}


def lenet_session(folder: Path, ranks: RankGroup = ALONE, progress: Any = False) -> Session:
    """LeNet-5 whose first layer has more rows than its moments need, so that some are drawn."""
    settings = Settings(cache_dir=folder, methods=METHODS, progress=progress)
    return open_session(load_lenet5(), parts(images()), settings, ranks)


def statistics(folder: Path) -> Any:
    """Calibrate and propose, each rank its share; keep what each holds and what the store held."""
    with joined() as ranks:
        session = lenet_session(folder / "cache", ranks)
        record, arrays = pack(calibrate(session), 0.0)
        save_file(as_tensors(arrays), folder / f"statistics.{ranks.rank}.safetensors")
        if ranks.is_first:
            shutil.copytree(folder / "cache", folder / "calibrated")
        offered = propose(session)
        return {
            "ops": to_json(record),
            "candidates": to_json(offered.candidates),
            "changes": offers_digest(offered.changes),
        }


def offers_digest(changes: Any) -> str:
    """Of every tensor of every change."""
    state = hashlib.sha256()
    for place in sorted(changes, key=repr):
        for name in ("codes", "scale", "weight", "bias", "kept"):
            value = getattr(changes[place], name)
            if value is not None:
                state.update(f"{place}{name}".encode())
                state.update(value.contiguous().numpy().tobytes())
    return state.hexdigest()


def whole(folder: Path) -> Any:
    """Compress; each rank says what its result is, and asks for the same file."""
    progress = Recorded()
    result = tersor.compress(
        load_lenet5(),
        parts(images()),
        target=TARGET,
        methods=METHODS,
        cache_dir=folder / "cache",
        progress=progress,
        recover=RECOVER,
    )
    result.save(folder / "lenet.tersor")
    x = images()["test"][:16]
    with torch.no_grad():
        outputs: Tensor = result.module(x)
    return {
        "assignment": dict(result.plan.assignment),
        "choice": result.plan.choice.describe(),
        "verdict": to_json(result.verdict),
        "pareto": to_json(result.pareto),
        "recoveries": to_json(result.record.recoveries),
        "report": len(to_json(result.record)["candidates"]),
        "module": hashlib.sha256(outputs.numpy().tobytes()).hexdigest(),
        "built": float((result.model(x) - outputs).abs().max() / outputs.abs().max()),
        "stages": progress.stages,
    }


@dataclass
class Dying(Recorded):
    """Ends its process without a word, or fails, at a stage on one rank."""

    rank: int = 1
    how: str = "kill"

    def stage(self, name: str, total: int | None = None) -> None:
        super().stage(name, total)
        if name == self.stop_at and dist.get_rank() == self.rank:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no such thing")

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


def tiny_rows() -> Tensor:
    found: Tensor = images()["train"][:90, 0, 14]
    return found


def compress_tiny(folder: Path, **options: Any) -> Any:
    """A model that is quick to price, under a size that formats alone reach."""
    return tersor.compress(
        options.pop("model", None) or Tiny().eval(),
        tersor.Data([options.pop("rows", tiny_rows())], output="values"),
        target=tersor.Target(size_ratio=1.5),
        methods=("quantize",),
        cache_dir=folder / "cache",
        **{"progress": False, **options},
    )


def error_of(run: Callable[[], Any]) -> dict[str, str]:
    try:
        run()
    except (TersorError, ValueError) as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {}


def dies(folder: Path) -> Any:
    """The named rank is killed at the named stage."""
    progress = Dying(rank=int(sys.argv[3]), stop_at=sys.argv[4])
    return error_of(lambda: compress_tiny(folder, progress=progress))


def differs(folder: Path) -> Any:
    """Other seeds, other data, another model, one rank that fails: one after the other."""
    rank = dist.get_rank()
    other: nn.Module = Tiny().eval()
    if rank:
        other.last.bias.data += 1  # type: ignore[union-attr, operator]
    runs: list[dict[str, Any]] = [
        {"seed": rank},
        {"rows": tiny_rows() + rank},
        {"model": other},
        {"progress": Dying(stop_at="errors", how="fail")},
    ]
    return [error_of(lambda options=options: compress_tiny(folder, **options)) for options in runs]


def alike_and_different(folder: Path) -> Any:
    """Two tasks in one start of the processes."""
    return {"statistics": statistics(folder), "errors": differs(folder / "other")}


if __name__ == "__main__":
    tasks = {f.__name__: f for f in (whole, dies, alike_and_different)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    with quick():
        said = tasks[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(said), flush=True)  # noqa: T201
    sys.stderr.flush()
    os._exit(0)  # some tasks leave the default group without one of its ranks
