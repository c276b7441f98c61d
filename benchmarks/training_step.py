"""A training step as it is written by hand beside the tuned one.

    python -m benchmarks.training_step [--device cpu] [--batch 128] [--steps 4290] [--names a,b] [--quick]

ResNet-20 on Fashion-MNIST from its initial weights, SGD with momentum, float32; images are bytes and
are normalised in the step. By hand: a ``DataLoader`` over a ``TensorDataset``, batches moved to the device,
forward, backward, step. Both sides have their own model and run in turn in one process: on a CPU
steps are timed singly, on a GPU in blocks of 20. A row holds both times of a step, the whole report of the
tuning with the seconds that each switch took to get ready, and what remains of the gain over ``--steps``
steps when all of the tuning is paid. Needs Debian's dataset-fashion-mnist.
"""

import argparse
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import tersor.train
from benchmarks import record
from tersor.cli.demo.pictures import DEBIAN, DEVIATION, IMAGE_HEADER, LABEL_HEADER, MEAN
from tersor.cli.demo.zoo import ResNet
from tersor.core.errors import DataError
from tersor.core.records import Timing
from tersor.timing.protocol import Protocol, measure, ratio
from tersor.train.tune import TuneReport

NAME = "training_step"
SEED = 0
EPOCHS = 10  # of 429 steps at a batch of 128: the length of the run that is not asked for otherwise
TRAINING_IMAGES = 55_000  # the last 5,000 of the 60,000 are for validation, which is not used here
BLOCK = 20
PROTOCOL = Protocol(rounds=5, runs=BLOCK)
ON_DEVICE = Protocol(rounds=7, runs=1, min_runs=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both sides.

    Attributes:
        hand, tuned: Time of one step, its batch included.
        speedup, low, high: hand / tuned, and 95 % bounds.
        ready_seconds: What all switches that are on took to get ready (compiling, recording).
        whole_speedup: Of a run of ``steps`` steps with all seconds of the tuning in it.
        loss: Mean of the last 20 losses of either side, after as many steps.
    """

    model: str
    device: str
    batch: int
    steps: int
    hand: Timing
    tuned: Timing
    speedup: float
    low: float
    high: float
    ready_seconds: float
    tuning_seconds: float
    whole_speedup: float
    loss: tuple[float, float]
    report: TuneReport


def images() -> TensorDataset:
    """Bytes [n, 1, 28, 28] and labels [n].

    Raises:
        DataError: The package is not installed.
    """
    paths = [DEBIAN / f"train-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise DataError(f"{DEBIAN}: not found; apt-get install dataset-fashion-mnist")
    pixels, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    x = np.frombuffer(pixels, np.uint8, offset=IMAGE_HEADER).reshape(-1, 1, 28, 28)
    y = np.frombuffer(labels, np.uint8, offset=LABEL_HEADER).astype(np.int64)
    return TensorDataset(torch.tensor(x)[:TRAINING_IMAGES], torch.tensor(y)[:TRAINING_IMAGES])


def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The loss of a batch."""
    x = (batch[0].float() / 255 - MEAN) / DEVIATION
    return functional.cross_entropy(model(x), batch[1])


def made(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same initial weights each time."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(SEED)
        model = ResNet().to(device).train()
    rates = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    return model, torch.optim.SGD(model.parameters(), **rates)


def loader(data: TensorDataset, batch: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(SEED)
    return DataLoader(data, batch, shuffle=True, drop_last=True, generator=generator)


def hand(source: DataLoader[Any], device: torch.device) -> Iterator[Tensor]:
    """Losses of the loop as it is usually written."""
    model, optimizer = made(device)
    while True:
        for batch in source:
            moved = [t.to(device) for t in batch]
            loss = step(model, moved)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield loss.detach()


def tuned(fast: Any, source: DataLoader[Any]) -> Iterator[Tensor]:
    """Losses of the tuned step."""
    while True:
        for batch in fast.batches(source):
            yield fast(batch)


class Side:
    """One side's steps as a call, and the losses that it made."""

    def __init__(self, steps: Iterator[Tensor]) -> None:
        self._steps = steps
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        self.losses.append(next(self._steps))

    def mean_after(self, count: int) -> float:
        """Of the 20 losses up to a number of steps."""
        return float(torch.stack(self.losses[max(0, count - BLOCK) : count]).float().mean())


class Blocks:
    """The same for a device that works behind the caller's back."""

    def __init__(self, side: Side, synchronize: Callable[[], None]) -> None:
        self._side, self._synchronize = side, synchronize

    def __call__(self) -> None:
        self._side()
        self._synchronize()

    def timed_ms(self) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(BLOCK):
            self._side()
        self._synchronize()
        return (time.perf_counter() - start) / BLOCK * 1e3


def run(options: argparse.Namespace) -> Row:
    """Tune, then both sides in turn."""
    device = torch.device(options.device)
    data = images()
    model, optimizer = made(device)
    source = loader(data, options.batch)
    fast = tersor.train.tune(
        step,
        model=model,
        optimizer=optimizer,
        batches=source,
        steps=options.steps,
        switches=options.names.split(",") if options.names else "auto",
    )
    sides = {
        "hand": Side(hand(loader(data, options.batch), device)),
        "tuned": Side(tuned(fast, source)),
    }
    is_cpu = device.type == "cpu"
    calls: dict[str, Any] = dict(sides)
    if not is_cpu:
        calls = {n: Blocks(s, torch.accelerator.synchronize) for n, s in sides.items()}
    timings = measure(calls, PROTOCOL if is_cpu else ON_DEVICE)
    before, after, report = timings["hand"], timings["tuned"], fast.report
    faster = ratio(before, after)
    plain_seconds = options.steps * before.median_ms / 1e3
    whole = plain_seconds / (options.steps * after.median_ms / 1e3 + report.seconds)
    count = min(len(s.losses) for s in sides.values())
    return Row(
        model="resnet20",
        device=report.device_name,
        batch=options.batch,
        steps=options.steps,
        hand=before,
        tuned=after,
        speedup=faster.value,
        low=faster.low,
        high=faster.high,
        ready_seconds=sum(s.seconds for s in report.on),
        tuning_seconds=report.seconds,
        whole_speedup=whole,
        loss=(sides["hand"].mean_after(count), sides["tuned"].mean_after(count)),
        report=report,
    )


def main() -> None:
    """Print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help=f"of the coming run; default: {EPOCHS} epochs")
    parser.add_argument("--names", default="", help="switches to try; default: all automatic ones")
    parser.add_argument("--quick", action="store_true", help="keep no row")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = EPOCHS * (TRAINING_IMAGES // options.batch)
    row = run(options)
    for line in row.report.lines():
        print(line)
    print(
        f"{row.model} batch {row.batch} on {row.device}: by hand {row.hand.median_ms:.2f} ms, tuned "
        f"{row.tuned.median_ms:.2f} ms a step: {row.speedup:.2f}x ({row.low:.2f} to {row.high:.2f}); "
        f"{row.ready_seconds:.1f} s to get ready, {row.tuning_seconds:.0f} s of tuning, "
        f"{row.whole_speedup:.2f}x over {row.steps} steps with it; loss {row.loss[0]:.4f} by hand, "
        f"{row.loss[1]:.4f} tuned"
    )
    if not options.quick:
        settings = {"threads": torch.get_num_threads(), "block": BLOCK}
        record.append(NAME, [row], seed=SEED, settings=settings)


if __name__ == "__main__":
    main()
