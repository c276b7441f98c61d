"""A snapshot: whatever steps change is put back exactly, and what is not a value stays the same."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from tersor.train.tune_state import (
    Randomness,
    Snapshot,
    generators_of,
    seed_all,
    without_hooks,
)
from tests.unit.train.comparing import same

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, 1e-2),
    "tensor rate": lambda p: AdamW(p, torch.tensor(1e-2)),
    "rmsprop": lambda p: RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 1e-2),
    "nadam": lambda p: NAdam(p, 1e-2),
}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(4 * 16, 3),
        )  # fmt: skip


def step(model: nn.Module, optimizer: Optimizer) -> None:
    x = torch.randn(8, 1, 6, 6)
    nn.functional.cross_entropy(model(x), torch.randint(3, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()


def picture(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Everything, by value."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "modes": [m.training for m in model.modules()],
            "gradients": [p.grad for p in model.parameters()],
            "state": optimizer.state_dict(),
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        }
    )


@pytest.mark.parametrize("before", [0, 3], ids=["fresh", "in training"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_all_that_steps_change_is_put_back(make: Callable[[Any], Optimizer], before: int) -> None:
    randomness = Randomness.now()
    model = network()
    optimizer = make(model.parameters())
    for _ in range(before):
        step(model, optimizer)
    model[1].eval()  # a frozen batch norm
    next(model.parameters()).grad = torch.ones(4, 1, 3, 3)
    wanted = picture(model, optimizer)
    snapshot = Snapshot(model, optimizer)
    for _ in range(2):  # more than once
        model.train()
        for _ in range(3):
            step(model, optimizer)
        random.random()  # noqa: S311
        np.random.rand()  # noqa: NPY002
        optimizer.param_groups[0]["lr"] = 5.0
        optimizer.param_groups[0]["new"] = 1
        assert not same(picture(model, optimizer), wanted)
        snapshot.restore()
        assert same(picture(model, optimizer), wanted)
    randomness.restore()


def test_objects_and_addresses_stay() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), torch.tensor(1e-2))
    step(model, optimizer)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    moments = optimizer.state[first]
    objects = [first, first.grad, moments, moments["exp_avg"], optimizer.param_groups[0]["lr"],
               optimizer.param_groups[0]["params"], model[1].running_mean]  # fmt: skip
    address = first.data_ptr()
    snapshot = Snapshot(model, optimizer)
    step(model, optimizer)
    snapshot.restore()
    now = [next(model.parameters()), first.grad, optimizer.state[first],
           optimizer.state[first]["exp_avg"], optimizer.param_groups[0]["lr"],
           optimizer.param_groups[0]["params"], model[1].running_mean]  # fmt: skip
    assert all(a is b for a, b in zip(objects, now, strict=True))
    assert first.data_ptr() == address


def test_training_goes_on_as_if_nothing_had_been() -> None:
    randomness = Randomness.now()
    ends = []
    for is_disturbed in (False, True):
        seed_all(5)
        model = network()
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
        step(model, optimizer)
        if is_disturbed:
            snapshot = Snapshot(model, optimizer)
            for _ in range(4):
                step(model, optimizer)
            snapshot.restore()
        for _ in range(3):
            step(model, optimizer)
        ends.append(picture(model, optimizer))
    assert same(*ends)
    randomness.restore()


def test_parameters_that_only_the_optimizer_has_are_put_back() -> None:
    model, centre = nn.Linear(2, 1), nn.Parameter(torch.ones(3))
    optimizer = SGD([*model.parameters(), centre], 1.0)
    snapshot = Snapshot(model, optimizer)
    centre.data += 1
    snapshot.restore()
    assert torch.equal(centre.detach(), torch.ones(3))


def test_a_buffer_that_was_replaced_is_the_old_one_again() -> None:
    model = network()
    snapshot = Snapshot(model, SGD(model.parameters(), 0.1))
    old = model[1].running_mean
    model[1].running_mean = torch.ones(4)
    snapshot.restore()
    assert model[1].running_mean is old
    assert torch.equal(old, torch.zeros(4))


def test_counters_of_an_optimizer_are_put_back() -> None:
    class Counting(SGD):
        count = 0

        def step(self, closure: Any = None) -> Any:
            self.count = self.count + 1
            return super().step(closure)

    model = nn.Linear(2, 1)
    optimizer = Counting(model.parameters(), 0.1)
    snapshot = Snapshot(model, optimizer)
    optimizer.step()
    assert optimizer.count == 1
    snapshot.restore()
    assert optimizer.count == 0
    assert "count" not in vars(optimizer)


def test_a_scaler_is_put_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), 0.1)
    snapshot = Snapshot(model, optimizer, scaler)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    snapshot.restore()
    assert scaler.get_scale() == 64.0


def test_generators_of_a_loader_are_found_once_and_put_back() -> None:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    assert generators_of(loader) == (generator,)
    assert generators_of([1]) == ()
    randomness = Randomness.now(generators_of(loader))
    (first,), (second,) = [list(loader) for _ in range(2)]
    assert not torch.equal(first[0], second[0])
    randomness.restore()
    assert torch.equal(next(iter(loader))[0], first[0])


def test_seeds_set_all_generators() -> None:
    randomness = Randomness.now()

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002, S311

    seed_all(1)
    one = drawn()
    seed_all(2)
    two = drawn()
    seed_all(1)
    assert drawn() == one
    assert all(a != b for a, b in zip(one, two, strict=True))
    randomness.restore()


def test_hooks_are_off_for_a_while() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), 0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with without_hooks(optimizer) as count:
        optimizer.step()
    assert count == 2
    assert calls == []
    optimizer.step()
    assert calls == ["before", "after"]
