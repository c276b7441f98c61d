"""The fast step on a CUDA device: each switch trains as the plain step does, and all of them together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import tersor.train
from tersor.train.switches import ChannelsLast, Compiled, ResidentData, Switch
from tersor.train.switches_cuda import CudaGraph, CudnnBenchmark, OptimizerGraph
from tersor.train.switches_optimizer import FusedOptimizer
from tersor.train.tune import LossRule, TimeRule
from tersor.train.tune_arena import Arena
from tersor.train.tune_batches import draw_pool
from tersor.train.tune_state import Snapshot
from tersor.train.tune_steps import Job, plain, platform_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
ROUNDING = 1e-3  # float32 sums in another order, through ten steps of Adam
STEPS = 10


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
        )  # fmt: skip
    return model.cuda()


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (512, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(512) % 10)
    return DataLoader(data, 32, shuffle=True, generator=generator)


def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0].float() / 128 - 1), batch[1])


def job(kind: str = "adamw") -> Job:
    model, source = network(), loader()
    optimizers: dict[str, Callable[[], Optimizer]] = {
        "adamw": lambda: AdamW(model.parameters(), 1e-3),
        "sgd": lambda: SGD(model.parameters(), 1e-2, momentum=0.9, nesterov=True),
    }
    device = next(model.parameters()).device
    return Job(
        step=step,
        model=model,
        optimizer=optimizers[kind](),
        source=source,
        device=device,
        platform=platform_of(device),
        pool=draw_pool(source, STEPS, 1e9),
    )


@pytest.mark.parametrize(
    "switches",
    [
        (CudaGraph,),
        (lambda: FusedOptimizer("fused"),),
        (ChannelsLast, lambda: FusedOptimizer("fused"), CudaGraph),
        (Compiled, CudaGraph),
        (CudnnBenchmark, CudaGraph),
        (CudaGraph, OptimizerGraph),
        (ChannelsLast, CudnnBenchmark, CudaGraph, OptimizerGraph),
        (lambda: FusedOptimizer("fused"), CudaGraph, OptimizerGraph),
    ],
)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_switches_train_as_the_plain_step_also_after_a_change(
    switches: tuple[Callable[[], Switch], ...], kind: str
) -> None:
    task = job(kind)
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    wanted = torch.tensor(arena.losses((), 0, 0, STEPS))
    chosen: tuple[Switch, ...] = ()
    for make in switches:
        switch = make()
        arena.enter(chosen)
        assert switch.refusal(task, arena.recipe) == ""
        chosen = (*chosen, switch)
    for configuration in (chosen, (), chosen):  # recorded work survives a change and back
        found = torch.tensor(arena.losses(configuration, 0, 0, STEPS))
        assert torch.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_data_on_the_card_are_the_loaders_batches() -> None:
    task = job()
    switch = ResidentData()
    assert switch.refusal(task, plain(task)) == ""
    assert switch.gives_the_same(task)
    batch = next(iter(switch.apply(task, plain(task)).batches))
    assert all(t.device == task.device for t in batch)
    assert batch[0].dtype == torch.uint8


def test_a_tuned_step_trains_on_and_an_odd_batch_too() -> None:
    model, source = network(), loader()
    optimizer = AdamW(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    fast = tersor.train.tune(
        step,
        model=model,
        optimizer=optimizer,
        batches=source,
        loss_rule=LossRule(steps=20, seeds=3),
        time_rule=TimeRule(rounds=3),
        progress=False,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
    losses = [fast(b) for _ in range(20) for b in fast.batches(source)]
    assert float(losses[-1]) < float(losses[0])
    odd = [torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)]
    assert torch.isfinite(fast(odd))
    assert all(s.why for s in fast.report.switches)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_recorded_optimizer_follows_its_scheduler_and_a_loaded_state(kind: str) -> None:
    """Gradients are the batch's mean everywhere, so that nothing but the optimizer can differ."""

    def linear(model: nn.Module, batch: list[Tensor]) -> Tensor:
        scale = batch[0].float().mean() / 128 - 0.9
        return torch.stack([p.sum() for p in model.parameters()]).sum() * scale

    task, free = job(kind), job(kind)
    (model, optimizer), (twin, other) = ((t.model, t.optimizer) for t in (task, free))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, other)]
    fast = tersor.train.tune(
        linear,
        model=model,
        optimizer=optimizer,
        batches=loader(),
        scheduler=schedules[0],
        switches=["cuda_graph", "optimizer_graph"],
        loss_rule=LossRule(tolerance=0.99),
        time_rule=TimeRule(gain=0.0),
        progress=False,
    )
    assert fast.report.switches[0].is_on, fast.report.switches[0].why
    if not fast.report.switches[1].is_on:
        pytest.skip(fast.report.switches[1].why)  # so small a step gains by chance alone
    for i, batch in enumerate([[t.cuda() for t in batch] for batch in loader()][:8]):
        if i == 4:
            optimizer.load_state_dict(other.state_dict())
        fast(batch)
        linear(twin, batch).backward()
        other.step()
        schedules[1].step()
        other.zero_grad(set_to_none=True)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def test_autocast_around_all_does_not_freeze_the_weights_of_a_record() -> None:
    task = job("sgd")
    with torch.autocast("cuda", torch.bfloat16):
        arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
        found = arena.losses((CudaGraph(),), 0, 0, STEPS)
        arena.leave()
    free = job("sgd")
    plainly = replace(free, step=autocast)
    arena = Arena(plainly, Snapshot(free.model, free.optimizer), lambda: 0.0)
    assert torch.allclose(
        torch.tensor(found), torch.tensor(arena.losses((), 0, 0, STEPS)), rtol=1e-2, atol=1e-2
    )


def autocast(model: nn.Module, batch: list[Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return step(model, batch)


def test_random_numbers_differ_from_replay_to_replay() -> None:
    def random(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x = batch[0].float() / 128 - 1
        return step(model, [torch.zeros_like(x), batch[1]]) * torch.rand((), device=x.device)

    model = network()
    fast = tersor.train.tune(
        random,
        model=model,
        optimizer=AdamW(model.parameters(), 0.0),
        batches=loader(),
        switches=["cuda_graph"],
        loss_rule=LossRule(tolerance=0.99),
        time_rule=TimeRule(gain=0.0),
        progress=False,
    )
    (report,) = fast.report.switches
    batch = next(iter(loader()))
    losses = {float(fast(batch)) for _ in range(20)}
    assert len(losses) == 20, report.why
