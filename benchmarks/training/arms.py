"""One run of training, step by step, so that several can take turns on one device."""

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from benchmarks.training.data import Data, accuracy, plans
from benchmarks.training.nets import (
    SMALL,
    Counts,
    Net,
    fitted,
    fresh,
    kept,
    macs_of,
    narrow,
    planned,
    ranks_at,
    structure_of,
    uniform,
    whole_macs,
)
from benchmarks.training.steps import Eager, Recorded
from tersor.train.cutting import cut_
from tersor.train.factorizer import Factorizer
from tersor.train.schedule import Schedule
from tersor.train.scores import Scores
from tersor.train.shrinker import Shrinker
from tersor.train.units import Units
from tests.data.zoo import load_resnet20

ARMS = (
    "dense", "regrow", "oneshot", "posttrained", "scratch", "groupnorm", "spectral", "bits4", "bits2",
)  # fmt: skip
WHOLE = ("dense", "bits4", "bits2")  # arms that have no share
RATE = 0.1  # peak of random weights
PRUNING_STEPS = 400  # Torch-Pruning stops at the first step below the share
LOOKS = 32  # batches that one shot is decided by
Changed = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all arms of a table.

    Attributes:
        start: "checkpoint" (the trained ResNet-20; the arm scratch has random weights all the same) or "random".
        blocks, kind: A stage, 3 for ResNet-20, 9 for ResNet-56; or layers of a "vit".
        widths: "uniform" (the same share of every width) or "planned" (by measured errors).
        rate: Peak of the learning rate; that of the arm scratch is 0.1.
        distil: Weight of the trained network's own outputs in the loss of every arm; the rest is that
            of labels.
        erase: Side of the square that is erased in each training image.
        is_recorded: Forward and backward are one CUDA graph.
        is_half: Forward in bfloat16 (autocast), channels innermost.
        together: Runs that took turns on the device: their seconds are those of all.
    """

    start: str
    blocks: int = SMALL
    widths: str = "uniform"
    epochs: int
    images: int
    batch: int
    rate: float
    distil: float = 0.0
    temperature: float = 2.0
    erase: int = 0
    device: str
    is_recorded: bool = False
    is_half: bool = False
    together: int = 1
    seed: int = 0
    kind: str = "resnet"

    @property
    def net(self) -> Net:
        """What is trained."""
        return Net(self.kind, self.blocks)


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
        hook_share: Of the time between steps; ours alone, and only where runs do not take turns and are
            not recorded (a hook of a recorded run waits for the card).
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


class Arm:
    """One run of training."""

    def __init__(self, arm: str, share: float, setting: Setting, data: Data) -> None:
        self.arm, self.share, self.setting, self.data = arm, share, setting, data
        an_epoch = max(1, len(data.labels) // setting.batch)
        self.steps = setting.epochs * an_epoch
        self.schedule = Schedule(total_steps=self.steps, epoch=an_epoch)
        self._teacher: nn.Module | None = None
        if setting.distil:
            self._teacher = load_resnet20().to(setting.device).eval()
            if setting.is_half:
                self._teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(self) -> Row:
        """Train, and look at the test images once."""
        steps = self.train()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                row: Row = end.value
                return row

    def train(self) -> Generator[None, None, Row]:
        """Train, a step at a time."""
        setting = self.setting
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            counts = self._counts()
            model = self._model(counts).to(setting.device).train()
            if setting.is_half:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_tuning = setting.start == "checkpoint"
        peak = RATE if self.arm == "scratch" and is_tuning else setting.rate
        optimizer = setting.net.optimizer(model, peak)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        shrinker = self._attached(model, optimizer, counts)
        at = self._moments(counts)
        gradients = (Recorded if setting.is_recorded else Eager)(self._loss)
        start = time.perf_counter()
        for step, plan in enumerate(self._plans()):
            if step in at:
                model, optimizer = at[step](model, optimizer)
                rate.optimizer = optimizer
            gradients(model, optimizer, plan)
            optimizer.step()
            rate.step()
            yield
        if setting.device != "cpu":
            torch.cuda.current_stream().synchronize()
        seconds = time.perf_counter() - start
        report = None
        if shrinker is not None:
            model, report = shrinker.finish()
        is_alone = setting.together == 1 and not setting.is_recorded
        return Row(
            arm=self.arm,
            share=self.share,
            macs_share=macs_of(model) / whole_macs(setting.net),
            parameters=sum(p.numel() for p in model.parameters()),
            accuracy=accuracy(model, self.data.test),
            validation=accuracy(model, self.data.validation),
            seconds=seconds,
            epochs=setting.epochs,
            seed=setting.seed,
            difference=None if report is None else report.difference,
            hook_share=report.hook_share if report is not None and is_alone else None,
        )

    def _plans(self) -> Generator[Tensor, None, None]:
        own = self.setting
        yield from plans(
            len(self.data.labels),
            batch=own.batch,
            epochs=own.epochs,
            seed=own.seed,
            device=own.device,
        )

    def _loss(self, model: nn.Module, plan: Tensor) -> Tensor:
        """Labels, and the trained network's outputs at a temperature (Hinton et al. 2015)."""
        x, y = self.data.batch(plan, self.setting.erase)
        logits = self._logits(model, x)
        loss = functional.cross_entropy(logits, y)
        if self._teacher is None:
            return loss
        share, hot = self.setting.distil, self.setting.temperature
        with torch.no_grad():
            wanted = functional.log_softmax(self._logits(self._teacher, x) / hot, 1)
        apart = functional.kl_div(
            functional.log_softmax(logits / hot, 1), wanted, reduction="batchmean", log_target=True
        )
        return (1 - share) * loss + share * hot**2 * apart

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self.setting.is_half:
            return cast(Tensor, model(x))
        x = x.contiguous(memory_format=torch.channels_last)
        kind = self.setting.device.partition(":")[0]
        with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
            return cast(Tensor, model(x)).float()

    def _counts(self) -> Counts:
        """Units or ranks that the arm ends with; empty where it has none to choose."""
        if self.arm in (*WHOLE, "groupnorm"):
            return {}
        if self.arm == "spectral":
            return ranks_at(self.share)
        if self.setting.widths == "planned":
            return planned(self.share)
        return uniform(self.share, self.setting.net)

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
            self.data.example,
            total_steps=self.steps,
            schedule=self.schedule,
            **options[self.arm],
        )

    def _model(self, counts: Mapping[str, int]) -> nn.Module:
        if self.arm == "scratch":
            return narrow(counts, self.setting.net)
        if self.arm == "posttrained":
            return fitted(dict(counts))
        is_trained = self.setting.start == "checkpoint"
        return load_resnet20() if is_trained else self.setting.net.made()

    def _rate(self, step: int) -> float:
        """Warm-up over a twentieth of the run, then a cosine."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _moments(
        self, counts: Mapping[str, int]
    ) -> dict[int, Callable[[nn.Module, torch.optim.Optimizer], Changed]]:
        """What happens to the model in front of some steps."""
        at = 0 if self.setting.start == "checkpoint" else self.schedule.last
        if self.arm == "oneshot":
            return {self.schedule.last: lambda m, o: self._cut(m, o, counts)}
        return {at: self._prune} if self.arm == "groupnorm" else {}

    def _cut(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, counts: Mapping[str, int]
    ) -> Changed:
        """The units with the largest squared saliency on 32 batches stay; one look, no way back."""
        groups = [g for n, g in structure_of(self.setting.net).groups.items() if n in counts]
        units, scores = Units.of(model, groups), Scores()
        gradients = Eager(self._loss)
        for _, plan in zip(range(LOOKS), self._plans(), strict=False):
            gradients(model, optimizer, plan)
            scores.update(units, optimizer)
        optimizer.zero_grad()
        cut_(model, groups, kept(scores.values, counts))
        return model, fresh(model, optimizer)

    def _prune(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Changed:
        import torch_pruning as tp

        example = self.data.validation[0][:2]
        model.eval()  # its own passes are of two images: batch statistics of those would stay
        whole, _ = tp.utils.count_ops_and_params(model, example)
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.95,
            iterative_steps=PRUNING_STEPS,
            ignored_layers=self.setting.net.left_alone(model),
        )
        macs = whole
        while macs > self.share * whole and pruner.current_step < PRUNING_STEPS:
            pruner.step()
            macs, _ = tp.utils.count_ops_and_params(model, example)
        model.train()
        return model, fresh(model, optimizer)


def take_turns(arms: list[Arm]) -> list[Row]:
    """All runs at once on one card, a step each in turn, each on a stream of its own."""
    waiting = [(i, a.train(), torch.cuda.Stream()) for i, a in enumerate(arms)]
    rows: dict[int, Row] = {}
    while waiting:
        for entry in list(waiting):
            index, steps, stream = entry
            try:
                with torch.cuda.stream(stream):
                    next(steps)
            except StopIteration as end:
                rows[index] = end.value
                waiting.remove(entry)
    return [rows[i] for i in range(len(arms))]
