"""The steps of one part: the mean beside the tensors, restarts with smaller steps, and an end in vain."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.errors import ConfigError
from tersor.core.recovery import Recover
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.matching import counterparts
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph
from tersor.graph.frontiers import penultimate, whole
from tersor.graph.training import leaves, map_names
from tersor.recover import training
from tersor.recover.blocks import reconstruct
from tersor.recover.goals import Goal, Goals, Judged, Teacher
from tersor.recover.runs import Run
from tersor.recover.samples import Drawn, Pool
from tersor.recover.tensors import Tensors
from tersor.recover.training import Budget, Part, outputs, train
from tests.unit.capturing import graph_of, random, trained
from tests.unit.recover.test_blocks import Residual, batches_of, error

STEPS = 60
OUTPUTS = Goal()


@dataclass(frozen=True)
class Task:
    """A model that was hurt, its tensors and all of it as one part."""

    original: Graph
    hurt: Graph
    goals: Goals
    tensors: Tensors
    part: Part

    def run(self, part: Part | None = None, **options: Any) -> training.Trained:
        budget = options.pop("budget", Budget(clock=lambda: 0.0, steps=STEPS))
        return train(
            part or self.part,
            self.tensors,
            list(self.tensors.leaves),
            budget,
            options.pop("rate", 0.01),
            torch.Generator().manual_seed(0),
        )


def task(goal: Goal = OUTPUTS, *, labels: bool = False) -> Task:
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    axes = analyse_axes(original)
    keep = {"up.0": [0, 2, 4, 6], "up.1": [1, 2, 3], "stem": [0, 1, 2, 4]}
    hurt = keep_units(original, axes, keep)
    known = counterparts(axes, axes.removed(gone_from(axes, keep)))
    teacher = Teacher(graph=original, kind="logits", counterparts=known)
    batches = batches_of(random(136, 1, 6, 6, seed=3))
    items = [(flat[0], torch.arange(len(flat[0])) % 4) for flat in batches]
    judged = Judged(lambda y, item: functional.cross_entropy(y, item[1]), items)
    goals = Goals(teacher, hurt, batches, judged if labels else None)
    found = leaves(hurt)
    tensors = Tensors(hurt.module, found)
    block = whole(hurt.module, [leaf.target for leaf in found], map_names(hurt.module))
    assert block is not None
    run = Run(hurt.module, batches, tensors.value)
    values = goals.read(block, run, {n.name for n in block.nodes})
    return Task(original, hurt, goals, tensors, goals.outputs_of(block, values, 16, goal))


class Spy:
    """A loss that is no number at some steps; steps alone have gradients."""

    def __init__(self, loss: training.Loss, bad: range) -> None:
        self.loss, self.bad, self.calls = loss, bad, 0

    def __call__(self, got: Mapping[str, Any], drawn: Drawn) -> Tensor:
        found = self.loss(got, drawn)
        if not torch.is_grad_enabled():
            return found
        self.calls += 1
        return found * math.nan if self.calls - 1 in self.bad else found


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rate of each step of the first tensor."""
    found: list[float] = []
    real = training._step

    def step(part: Part, tensors: Tensors, optimizer: Any, drawn: Drawn, ranks: Any) -> bool:
        found.append(optimizer.param_groups[0]["lr"])
        return real(part, tensors, optimizer, drawn, ranks)

    monkeypatch.setattr(training, "_step", step)
    return found


@pytest.mark.parametrize("shape", [(9, 3, 4, 5), (9, 1, 4, 4), (9, 3, 1, 1), (9, 6), (9, 3, 4)])
def test_images_are_drawn_as_they_are_wherever_their_channels_lie(shape: tuple[int, ...]) -> None:
    values, wanted = random(*shape), random(*shape, seed=1)
    codes = torch.arange(9 * 4).reshape(9, 1, 2, 2)
    drawn = [Drawn({"x": v, "codes": c}, {"y": w}, None) for v, c, w in
             zip(values.split(3), codes.split(3), wanted.split(3), strict=True)]  # fmt: skip
    names = frozenset({"x", "codes"})
    plain, last = (Pool(drawn, names, 5, channels_last=flag) for flag in (False, True))
    for seed in range(3):
        one, other = (p.draw(torch.Generator().manual_seed(seed)) for p in (plain, last))
        for name in ("x", "codes"):
            assert torch.equal(one.values[name], other.values[name])
        assert torch.equal(one.wanted["y"], other.wanted["y"])
        if len(shape) == 4:
            assert other.values["x"].is_contiguous(memory_format=torch.channels_last)


def test_kernels_lie_as_before_once_they_are_trained() -> None:
    given = task()
    targets = [n for n, t in given.tensors.now.items() if t.dim() == 4]
    given.tensors.begin(targets, 0.01)
    free = [given.tensors.value(n) for n in targets]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in free)
    given.tensors.end(given.tensors.snapshot())
    assert all(given.tensors.now[n].is_contiguous() for n in targets)
    assert given.run().after > 0


def test_the_rate_rises_and_falls_to_nothing(rates: list[float]) -> None:
    done = task().run()
    assert done.restarts == 0
    assert done.after < 0.2 * done.before
    peak = max(range(STEPS), key=rates.__getitem__)
    assert peak == math.ceil(0.05 * STEPS)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01 * rates[peak]


def test_a_step_without_a_number_rewinds_the_rate(rates: list[float]) -> None:
    given = task()
    loss = Spy(given.part.loss, range(30, 31))
    done = given.run(replace(given.part, loss=loss))
    assert done.restarts == 1
    assert done.steps == STEPS - 1
    first, second = rates[:31], rates[31:]
    assert second[0] < max(second)  # it rises again, in 1/20 of what is left
    assert max(second) == pytest.approx(0.25 * max(first), rel=0.01)
    assert second[-1] < 0.02 * max(second)  # and falls to nothing by the end
    assert done.after < 0.2 * done.before
    assert all(bool(torch.isfinite(t).all()) for t in given.tensors.now.values())


def test_numbers_that_never_come_end_the_part_early() -> None:
    given = task()
    before = {n: t.clone() for n, t in given.tensors.now.items()}
    loss = Spy(given.part.loss, range(10**6))
    done = given.run(replace(given.part, loss=loss))
    assert (done.steps, done.restarts) == (0, 5)
    assert loss.calls == 5
    assert done.after == done.before
    assert all(torch.equal(t, before[n]) for n, t in given.tensors.now.items())


def test_a_loss_that_rises_goes_back_to_the_best(rates: list[float]) -> None:
    """Steps as large as the weights themselves: only after some restarts is anything gained."""
    given = task()
    done = given.run(rate=1.0)
    assert done.restarts >= 1
    assert min(rates[-STEPS // 2 :]) < 0.25 * max(rates)
    assert done.after <= done.before


def test_the_mean_follows_the_formula() -> None:
    given = task()
    tensors, generator = given.tensors, torch.Generator().manual_seed(0)
    tensors.begin(["head.weight"], 0.1)
    free = tensors.value("head.weight")
    wanted = free.detach().clone()
    for n in range(80):
        with torch.no_grad():
            free += torch.randn(free.shape, generator=generator)
        memory = min(0.98, (1 + n) / (10 + n))
        wanted = free.detach().clone() if n == 0 else memory * wanted + (1 - memory) * free.detach()
        tensors.average_()
    with tensors.averaged():
        assert torch.allclose(tensors.value("head.weight"), wanted, atol=1e-5)
        assert torch.equal(tensors.snapshot()["head.weight"], tensors.value("head.weight"))
    assert torch.equal(tensors.value("head.weight"), free)


class Cut(Budget):
    """A run that ends where the rate is still high."""

    def progress(self) -> Iterator[float]:
        yield from (0.2 + 0.29 * i / STEPS for i in range(STEPS))


def test_the_mean_stays_where_it_is_better() -> None:
    given = task()
    done = given.run(budget=Cut(clock=lambda: 0.0), rate=0.2)
    assert done.is_mean
    loss = training._unseen_loss(given.part, given.tensors)
    assert loss == pytest.approx(done.after, rel=1e-5)


def test_outputs_at_a_temperature_are_the_formula_s() -> None:
    given = task(Goal(temperature=3.0))
    drawn = given.part.unseen[0]
    got = outputs(given.part.block, given.tensors, drawn)
    (new,), (old,) = list(got.values()), list(drawn.wanted.values())

    def divergence(hot: float) -> float:
        pair = (functional.log_softmax(t.double() / hot, -1) for t in (new, old))
        return hot**2 * float(functional.kl_div(*pair, log_target=True, reduction="batchmean"))

    assert float(given.part.loss(got, drawn)) == pytest.approx(divergence(3.0), rel=1e-5)
    assert given.part.check is not None
    assert float(given.part.check(got, drawn)) == pytest.approx(divergence(1.0), rel=1e-5)


def test_features_are_those_in_front_of_the_pooling() -> None:
    plain = task()
    graph = plain.hurt.module
    targets, known = list(plain.tensors.leaves), {n.name for n in graph.graph.nodes}
    name = penultimate(graph, targets, map_names(graph), known)
    assert name is not None
    given = task(Goal(feature=name), labels=True)
    drawn = given.part.unseen[0]
    assert drawn.wanted[name].shape[1:] == (4, 6, 6)  # maps, not their means
    got = outputs(given.part.block, given.tensors, drawn)
    head = next(n for n in given.part.block.gives if n != name)
    own = (got[name] - drawn.wanted[name]).square().mean()
    seen = torch.cat([d.wanted[name] for d in given.part.seen.batches][:7])
    spread = (seen - seen.mean(0)).square().mean()
    label = functional.cross_entropy(got[head], drawn.item[1])
    found = float(given.part.loss(got, drawn))
    assert found == pytest.approx(float(0.5 * own / spread + 0.5 * label), rel=0.02)


def test_training_towards_features_brings_outputs_closer() -> None:
    given = task()
    config = Recover(steps=STEPS, batch=16, towards="features", whole=1.0)
    teacher, batches = given.goals.teacher, batches_of(random(136, 1, 6, 6, seed=3))
    done = reconstruct(teacher, given.hurt, batches, config, seed=0)
    new = (random(64, 1, 6, 6, seed=9),)
    assert error(done.graph, given.original, new) < 0.1 * error(given.hurt, given.original, new)
    part = done.recovery.parts[-1]
    assert part.part == "whole"
    assert part.after < part.before


def test_a_model_without_features_is_named() -> None:
    graph = graph_of(trained(nn.Linear(5, 3)), random(4, 5))
    with pytest.raises(ConfigError, match="no features to train towards; use towards='outputs'"):
        reconstruct(
            Teacher(graph=graph, kind="values"),
            graph,
            batches_of(random(64, 5)),
            Recover(steps=2, batch=16, towards="features"),
            seed=0,
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [({"towards": "logits"}, "outputs, features"), ({"temperature": 0.5}, "wanted 1 to 20")],
)
def test_goals_that_there_are_not(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recover(**options)
