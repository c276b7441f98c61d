"""Seconds until ResNet-20 gets a given share of Fashion-MNIST right: ``python -m benchmarks.training_time``.

From random weights, batches of 128, SGD with momentum; images are shifted, mirrored and partly erased on the
device, in both loops by the same step. By hand: a ``DataLoader`` over a ``TensorDataset`` and float32, as in
``training_step``; tuned: the same step through ``tersor.train.tune``. The tuned run goes to its end; of the loop
by hand ``--hand-epochs`` are run, and its time to the goal is that of as many epochs as the tuned run needed:
what tuning switches on leaves the loss as it was (each switch is checked for that), so that both need
as many. Test images are looked at after every epoch, outside of all times; nothing is chosen by them.
Needs Debian's dataset-fashion-mnist.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor.train
from benchmarks import record
from benchmarks.prune import read
from benchmarks.training.data import ENDS, accuracy, changed, padded
from benchmarks.training_step import SEED, images, loader
from tersor.cli.demo.pictures import DEVIATION, MEAN
from tersor.cli.demo.zoo import ResNet
from tersor.train.tune import TuneReport

NAME = "training_time"
BATCH = 128
WARM = 0.1  # share of the run until the learning rate's peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both loops.

    Attributes:
        wanted: Percent of the 10,000 test images.
        epoch: The first after which as many were right; None: it was never so.
        best: The most that were right after any epoch, percent.
        hand_s, tuned_s: Of an epoch, medians.
        hand_to_goal_s, tuned_to_goal_s: None where the goal was not reached; without tuning.
        speedup, speedup_with_tuning: hand / tuned for the epochs that the goal took (all, where it was
            not reached).
        tuning_seconds: All of tuning, compiling included.
        curve: Percent right after each epoch of the tuned run.
        hand_curve: The same by hand.
    """

    device: str
    epochs: int
    wanted: float
    epoch: int | None
    best: float
    hand_s: float
    tuned_s: float
    hand_to_goal_s: float | None
    tuned_to_goal_s: float | None
    speedup: float
    speedup_with_tuning: float
    tuning_seconds: float
    curve: tuple[float, ...]
    hand_curve: tuple[float, ...]
    report: TuneReport


@dataclass(frozen=True, slots=True)
class Step:
    """The loss of a batch of bytes; ``erased`` is the side of the square that is set to the mean."""

    erased: int

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        x = (batch[0].float() / 255 - MEAN) / DEVIATION
        drawn = [torch.arange(len(x), device=x.device)]
        drawn += [torch.randint(0, end, (len(x),), device=x.device) for end in ENDS]
        x = changed(padded(x), torch.stack(drawn), self.erased)
        return functional.cross_entropy(model(x), batch[1])


class Made:
    """A model with its optimizer and rate, the same each time."""

    def __init__(self, device: str, steps: int, peak: float) -> None:
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(SEED)
            self.model = ResNet().to(device).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), peak, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        warm = max(1, round(WARM * steps))

        def rate(done: int) -> float:
            return min((done + 1) / warm, max(0.0, (steps - done) / (steps - warm)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)


def epochs(
    count: int,
    batches: Callable[[], Iterable[Any]],
    one: Callable[[Any], object],
    model: nn.Module,
    test: tuple[Tensor, Tensor],
) -> tuple[list[float], list[float]]:
    """Seconds of each epoch, and percent of the test images right after it."""
    seconds, right = [], []
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    for _ in range(count):
        wait()
        begun = time.perf_counter()
        for batch in batches():
            one(batch)
        wait()
        seconds.append(time.perf_counter() - begun)
        right.append(accuracy(model, test))
        print(f"epoch {len(right)}: {seconds[-1]:.2f} s, {right[-1]:.2f} %", flush=True)
    return seconds, right


def run(options: argparse.Namespace) -> Row:
    """Tune, train to the end, and some epochs by hand."""
    device, data = options.device, images()
    each = len(data) // BATCH
    steps = options.epochs * each
    pixels, labels = read("t10k")
    test = (pixels.to(device), labels.to(device))
    source = loader(data, BATCH)
    ours, step = Made(device, steps, options.rate), Step(options.erased)
    fast = tersor.train.tune(
        step,
        model=ours.model,
        optimizer=ours.optimizer,
        batches=source,
        steps=steps,
        scheduler=ours.scheduler,
        switches=options.names.split(",") if options.names else "auto",
    )
    tuned, curve = epochs(options.epochs, lambda: fast.batches(source), fast, ours.model, test)
    hand = Made(device, steps, options.rate)

    def plain(batch: list[Tensor]) -> None:
        step(hand.model, [t.to(device) for t in batch]).backward()
        hand.optimizer.step()
        hand.scheduler.step()
        hand.optimizer.zero_grad(set_to_none=True)

    other = loader(data, BATCH)
    slow, hand_curve = epochs(options.hand_epochs, lambda: other, plain, hand.model, test)
    first = next((i + 1 for i, right in enumerate(curve) if right >= options.until), None)
    each_hand, each_tuned = (sorted(times)[len(times) // 2] for times in (slow, tuned))
    needed = options.epochs if first is None else first
    whole, spent = needed * each_hand, sum(tuned[:needed])
    return Row(
        device=fast.report.device_name,
        epochs=options.epochs,
        wanted=options.until,
        epoch=first,
        best=max(curve),
        hand_s=each_hand,
        tuned_s=each_tuned,
        hand_to_goal_s=None if first is None else whole,
        tuned_to_goal_s=None if first is None else spent,
        speedup=whole / spent,
        speedup_with_tuning=whole / (spent + fast.report.seconds),
        tuning_seconds=fast.report.seconds,
        curve=tuple(curve),
        hand_curve=tuple(hand_curve),
        report=fast.report,
    )


def main() -> None:
    """Print and keep one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--hand-epochs", type=int, default=6)
    parser.add_argument("--until", type=float, default=95.0, help="percent of the test images")
    parser.add_argument("--rate", type=float, default=0.1, help="its peak")
    parser.add_argument("--erased", type=int, default=8, help="side of a square in each image")
    parser.add_argument("--names", default="", help="switches to try; default: all automatic ones")
    parser.add_argument("--quick", action="store_true", help="keep no row")
    options = parser.parse_args()
    row = run(options)
    for line in row.report.lines():
        print(line)
    reached = f"after epoch {row.epoch}" if row.epoch else f"never (at the most {row.best:.2f} %)"
    print(
        f"{row.wanted} % {reached}; an epoch {row.hand_s:.2f} s by hand, {row.tuned_s:.2f} s tuned: "
        f"{row.speedup:.2f}x, {row.speedup_with_tuning:.2f}x with {row.tuning_seconds:.0f} s of tuning"
    )
    if not options.quick:
        settings = {"batch": BATCH, "erased": options.erased, "rate": options.rate}
        record.append(NAME, [row], seed=SEED, settings=settings)


if __name__ == "__main__":
    main()
