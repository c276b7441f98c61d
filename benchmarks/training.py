"""Small out of training, against the ways people get there: ``python -m benchmarks.training``.

ResNet-20 on Fashion-MNIST. Every arm ends with the same number of units in every width (the same share of
each), trains on the same batches in the same order with the same optimizer, for equal epochs; seconds are
in each row, so that a slower arm is seen.

    dense     nothing is removed
    regrow    ours: units die while it trains, and may come back
    oneshot   the lowest scores at the end of the window all at once, no latents; then the rest of the run
    spectral  ours: dense until stable ranks settle, then the 3 x 3 kernels of the two wide stages become pairs, of
              ranks at which so many multiply-accumulates are left
    bits4     ours: every width stays, weights end on a grid of 4 bits; the share of multiply-accumulates is 1
    bits2     the same with 2 bits
    scratch   the final architecture from random weights: the gate that every table shows
    groupnorm Torch-Pruning, group norms, the same share of every width, at the beginning (checkpoint) or at
              the end of the window (random); then the rest of the run. (Global norms left some layers 4
              of 16 channels, and training did not recover.)

``--start checkpoint`` tunes the trained network of ``tests/data`` (scratch still starts from random weights),
``--start random`` trains it. Test images are touched once an arm.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from benchmarks import record
from benchmarks.prune import read, total_macs
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.zoo import ResNet
from tersor.core.progress import Printed
from tersor.train.cutting import cut_
from tersor.train.factorable import find_layers
from tersor.train.factorizer import Factorizer
from tersor.train.pairs import blank_pair, put_in_place
from tersor.train.probe import Probe
from tersor.train.schedule import Schedule
from tersor.train.shrinker import Shrinker
from tersor.train.structure import Structure, find_structure
from tests.data.zoo import load_resnet20

NAME = "training"
ARMS = ("dense", "regrow", "oneshot", "scratch", "groupnorm", "spectral", "bits4", "bits2")
WHOLE = ("dense", "bits4", "bits2")  # arms that have no share
SHARES = (1 / 2, 1 / 2.6, 1 / 4)
VALIDATION = 5_000
RATE, TUNING_RATE = 0.1, 0.02  # peaks: of random weights, of trained ones
PRUNING_STEPS = 400  # Torch-Pruning stops at the first step below the share


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all arms."""

    start: str
    epochs: int
    images: int
    batch: int
    rate: float
    device: str
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm at one share.

    Attributes:
        share: Of the multiply-accumulates, as asked.
        macs_share: As it is.
        accuracy: Percent of the 10,000 test images.
        validation: Percent of 5,000 training images that no arm trained on.
        seconds: Of the training, by the wall's clock, without reading data.
        difference: Of the outputs at the cut, of their scale; ours alone.
        hook_share: Of the time between steps; ours alone.
    """

    arm: str
    share: float
    macs_share: float
    parameters: int
    accuracy: float
    validation: float
    seconds: float
    epochs: int
    seed: int
    difference: float | None = None
    hook_share: float | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """Images and labels on the device."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, setting: Setting) -> "Data":
        """Fashion-MNIST, the last training images for validation."""
        images, labels = (t.to(setting.device) for t in read("train"))
        test = tuple(t.to(setting.device) for t in read("t10k"))
        last = len(images) - VALIDATION
        return cls(
            (images[: min(setting.images, last)], labels[: min(setting.images, last)]),
            (images[last:], labels[last:]),
            (test[0], test[1]),
        )


def macs_of(model: nn.Module) -> int:
    """Of one sample."""
    example = torch.zeros(2, 1, 28, 28)
    plain = copy.deepcopy(model).cpu()
    return total_macs(capture(plain, Samples(*flatten_item(example, "example"))).graph)


def counts_at(share: float) -> dict[str, int]:
    """The same share of every width, so that as much of the multiply-accumulates is left."""
    structure, whole = structure_of(), macs_of(ResNet())
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        counts = {n: max(1, round(g.units * middle)) for n, g in structure.groups.items()}
        low, high = (middle, high) if macs_of(narrow(counts)) <= share * whole else (low, middle)
    return {n: max(1, round(g.units * low)) for n, g in structure.groups.items()}


def ranks_at(share: float) -> dict[str, int]:
    """Ranks of the wide kernels, the same share of each one's largest, so that as much is left.

    Raises:
        ValueError: Not even ranks of 1 leave so little.
    """
    probe = Probe.of(*flatten_item(torch.zeros(2, 1, 28, 28), "example"))
    layers = find_layers(ResNet(), None, probe).by_name
    wide = {n: y for n, y in layers.items() if y.sizes.outputs >= 32 and prod(y.kernel) > 1}
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        ranks = {n: max(1, round(y.most * middle)) for n, y in wide.items()}
        low, high = (
            (middle, high) if macs_of(paired(ranks)) <= share * macs_of(ResNet()) else (low, middle)
        )
    if low == 0.0:
        raise ValueError(f"pairs of the wide kernels alone leave more than {share:.0%}")
    return {n: max(1, round(y.most * low)) for n, y in wide.items()}


def paired(ranks: Mapping[str, int]) -> nn.Module:
    """ResNet-20 with pairs of rows and columns."""
    model = ResNet()
    for name, rank in ranks.items():
        put_in_place(model, name, blank_pair(model.get_submodule(name), "height", rank))
    return model


def structure_of() -> Structure:
    """Of ResNet-20."""
    return find_structure(ResNet(), torch.zeros(2, 1, 28, 28))


def narrow(counts: Mapping[str, int]) -> nn.Module:
    """The final architecture, its weights as they are drawn for it."""
    model = ResNet()
    structure = structure_of()
    cut_(model, list(structure.groups.values()), {n: torch.arange(k) for n, k in counts.items()})
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()  # the spread of fresh weights is that of their own sizes
    return model


def batches(data: Data, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """Shifted by up to two pixels and mirrored, on the device; the same ones for every arm."""
    generator = torch.Generator().manual_seed(1000 + setting.seed)
    images, labels = data.train
    for _ in range(setting.epochs):
        order = torch.randperm(len(images), generator=generator)
        for begin in range(0, len(images) - setting.batch + 1, setting.batch):
            index = order[begin : begin + setting.batch].to(images.device)
            x = functional.pad(images[index], (2, 2, 2, 2), mode="replicate")
            row, column = torch.randint(0, 5, (2,), generator=generator).tolist()
            x = x[:, :, row : row + 28, column : column + 28]
            if bool(torch.rand((), generator=generator) < 0.5):
                x = x.flip(3)
            yield x, labels[index]


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent that are right."""
    was = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(part[0].split(500), part[1].split(500), strict=True)
        )
    model.train(was)
    return 100 * right / len(part[0])


class Arm:
    """One run of training."""

    def __init__(self, arm: str, share: float, setting: Setting, data: Data) -> None:
        self.arm, self.share, self.setting, self.data = arm, share, setting, data
        self.steps = setting.epochs * (len(data.train[0]) // setting.batch)
        self.schedule = Schedule(
            total_steps=self.steps, epoch=max(1, len(data.train[0]) // setting.batch)
        )
        self.example = data.train[0][:4].cpu()

    def run(self) -> Row:
        """Train, and look at the test images once."""
        setting = self.setting
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            counts = self._counts()
            model = self._model(counts).to(setting.device).train()
        optimizer = torch.optim.SGD(
            model.parameters(), setting.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        shrinker = self._attached(model, optimizer, counts)
        at = self._moments(counts)
        start = time.perf_counter()
        for step, (x, y) in enumerate(batches(self.data, setting)):
            if step in at:
                model, optimizer = at[step](model, optimizer)
                rate.optimizer = optimizer
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        seconds = time.perf_counter() - start
        report = None
        if shrinker is not None:
            model, report = shrinker.finish()
        return Row(
            arm=self.arm,
            share=self.share,
            macs_share=macs_of(model) / macs_of(ResNet()),
            parameters=sum(p.numel() for p in model.parameters()),
            accuracy=accuracy(model, self.data.test),
            validation=accuracy(model, self.data.validation),
            seconds=seconds,
            epochs=setting.epochs,
            seed=setting.seed,
            difference=None if report is None else report.difference,
            hook_share=None if report is None else report.hook_share,
        )

    def _counts(self) -> dict[str, int]:
        """Units or ranks that the arm ends with; empty where it has none to choose."""
        if self.arm in (*WHOLE, "groupnorm"):
            return {}
        return ranks_at(self.share) if self.arm == "spectral" else counts_at(self.share)

    def _attached(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, counts: Mapping[str, int]
    ) -> Shrinker | Factorizer | None:
        """What makes the model small, of our own arms."""
        options: dict[str, dict[str, Any]] = {
            "regrow": {"counts": counts},
            "spectral": {"counts": counts, "algorithm": "spectral"},
            "bits4": {"bits": 4},
            "bits2": {"bits": 2},
        }
        if self.arm not in options:
            return None
        return tersor.train.attach(
            model,
            optimizer,
            self.example,
            total_steps=self.steps,
            schedule=self.schedule,
            **options[self.arm],
        )

    def _model(self, counts: Mapping[str, int]) -> nn.Module:
        if self.arm == "scratch":
            return narrow(counts)
        return load_resnet20() if self.setting.start == "checkpoint" else ResNet()

    def _rate(self, step: int) -> float:
        """Warm-up over a twentieth of the run, then a cosine."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _moments(
        self, counts: Mapping[str, int]
    ) -> dict[
        int, Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, torch.optim.Optimizer]]
    ]:
        """What happens to the model in front of some steps."""
        at = 0 if self.setting.start == "checkpoint" else self.schedule.last
        if self.arm == "oneshot":
            return {self.schedule.last: lambda m, o: self._cut(m, o, counts)}
        return {at: self._prune} if self.arm == "groupnorm" else {}

    def _cut(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, counts: Mapping[str, int]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The units with the largest squared saliency on 32 batches stay; one look, no way back."""
        from tersor.train.scores import Scores
        from tersor.train.units import Units

        structure = structure_of()
        groups = list(structure.groups.values())
        units, scores = Units.of(model, groups), Scores()
        for _, (x, y) in zip(range(32), batches(self.data, self.setting), strict=False):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            scores.update(units, optimizer)
        optimizer.zero_grad()
        kept = {n: scores.values[n].topk(k).indices.sort().values for n, k in counts.items()}
        cut_(model, groups, kept)
        return model, _fresh(model, optimizer)

    def _prune(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        import torch_pruning as tp

        example = self.data.train[0][:2]
        model.eval()  # its own passes are of two images: batch statistics of those would stay
        whole, _ = tp.utils.count_ops_and_params(model, example)
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.95,
            iterative_steps=PRUNING_STEPS,
            ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        )
        macs = whole
        while macs > self.share * whole and pruner.current_step < PRUNING_STEPS:
            pruner.step()
            macs, _ = tp.utils.count_ops_and_params(model, example)
        model.train()
        return model, _fresh(model, optimizer)


def _fresh(model: nn.Module, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same settings with empty states."""
    settings = {k: v for k, v in old.param_groups[0].items() if k != "params"}
    made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    made.param_groups[0].update(settings)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--start", choices=("checkpoint", "random"), default="checkpoint")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=55_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rate = options.rate or (TUNING_RATE if options.start == "checkpoint" else RATE)
    setting = Setting(
        start=options.start,
        epochs=options.epochs,
        images=options.images,
        batch=options.batch,
        rate=rate,
        device=options.device,
    )
    data, printed = Data.load(setting), Printed()
    for seed in range(options.seeds):
        for share in options.shares:
            for name in options.arms:
                if name in WHOLE and share != options.shares[0]:
                    continue
                own = replace(setting, seed=seed)
                # The final architecture starts from random weights always.
                if name == "scratch" and options.rate is None:
                    own = replace(own, rate=RATE)
                row = Arm(name, share, own, data).run()
                printed.note(
                    f"{row.arm} at {row.macs_share:.3f}: {row.accuracy:.2f} % "
                    f"({row.validation:.2f} %), {row.seconds:.0f} s"
                )
                record.append(NAME, [row], seed=seed, settings=own)


if __name__ == "__main__":
    main()
