"""Weights of a few bits out of training: on the grid, resumed, with every optimizer, and bad input."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.group_grids import GroupGrid, dequantize, fit_steps, nearest_codes
from tersor.ops.parq import pulled
from tersor.train.resuming import load_state, save_state
from tersor.train.rounding import Wanted, rounding_of
from tersor.train.schedule import Schedule
from tersor.train.shrinker import Shrinker
from tests.data.zoo import accuracy, load_fashion, load_resnet20
from tests.unit.train.networks import Convolutional, Encoder, images
from tests.unit.train.test_shrinker import OPTIMIZERS

STEPS = 60
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.5, every=5, hard=0.9)
COUNTS = {"blocks.0.conv1": 7, "blocks.1.conv1": 9}


def network() -> Convolutional:
    """The same initial weights each time; its convolutions have enough weights for files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutional(width=12)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Shrinker:
    given = {"total_steps": STEPS, "bits": 4, "schedule": SCHEDULE} | options
    return tersor.train.attach(model, optimizer, images(4)[0], **given)


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    each: Callable[[int], None] = lambda _: None,
) -> None:
    for step in steps:
        x, y = images(16, seed=step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        each(step)


def levels(weight: Tensor) -> int:
    """The most distinct values that an output has."""
    return max(len(row.unique()) for row in weight.detach().flatten(1))


def is_on_grid(weight: Tensor, steps: Tensor, bits: int) -> bool:
    codes = weight.detach().flatten(1) / steps[:, None]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = codes.round().clamp(low, high)
    return torch.equal(whole * steps[:, None], weight.detach().flatten(1))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *((kind, 4) for kind in OPTIMIZERS),
        *((kind, 2) for kind in ("sgd", "adamw")),
        *(
            pytest.param(kind, 2, marks=pytest.mark.slow)
            for kind in OPTIMIZERS
            if kind not in ("sgd", "adamw")
        ),
    ],
)
def test_a_run_ends_on_the_grid_and_the_network_works(kind: str, bits: int) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    shrinker = attached(model, optimizer, bits=bits)
    run(model, optimizer, range(STEPS))
    x, y = images(64, seed=1000)
    small, report = shrinker.finish()
    with torch.no_grad():
        right = float((small.eval()(x).argmax(1) == y).double().mean())
    assert small is model
    assert right > 0.8
    assert {row.layer for row in report.rounded} == {
        f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)
    }
    assert {h.name for h in report.held} == {"stem", "head"}  # too small for files
    assert all("fewer than 1024" in h.reason for h in report.held)
    steps = shrinker.state_dict()["rounding"]["steps"]
    for row in report.rounded:
        weight = model.get_submodule(row.layer).weight
        assert is_on_grid(weight, steps[row.layer], bits)
        assert torch.equal(steps[row.layer], steps[row.layer].half().float())
        assert row.distance < 1
    assert levels(model.stem.weight) > 4
    assert f"grid of {bits} bits" in report.describe()
    assert not optimizer._optimizer_step_pre_hooks
    assert report.as_dict()["rounded"][0]["bits"] == bits


def test_the_pull_is_soft_first_and_hard_from_its_step_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    shrinker = attached(model, optimizer, bits=2)
    seen: list[int] = []
    run(model, optimizer, range(STEPS), lambda _: seen.append(levels(model.blocks[0].conv1.weight)))
    assert min(seen[: SCHEDULE.first]) > 50  # as it is, before the window
    assert max(seen[SCHEDULE.hard_step - 1 :]) <= 4
    middle = seen[SCHEDULE.first + 5 : SCHEDULE.hard_step - 1]
    assert min(middle) > 4
    assert not shrinker.finish()[1].notes


def test_latents_train_at_the_pulled_weights() -> None:
    """The definition: p <- SGD(p, gradient at the pulled weights), by plain loops."""
    torch.manual_seed(0)
    made = nn.Linear(32, 40)
    model = copy.deepcopy(made)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = Schedule(total_steps=40, begin=0.0, end=0.5, every=5, hard=1.0)
    x = torch.randn(12, 32)
    tersor.train.attach(model, optimizer, x, bits=3, total_steps=40, schedule=schedule)
    latent, bias = made.weight.detach().clone(), made.bias.detach().clone()
    weight = latent.clone()
    step_of = torch.zeros(40)
    for step in range(1, 31):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        gradients = torch.autograd.grad((x @ w.T + b).square().mean(), (w, b))
        latent, bias = latent - 0.1 * gradients[0], bias - 0.1 * gradients[1]
        if step == 1 or step % 5 == 0:
            step_of = fit_steps(latent[None], GroupGrid(bits=3)).step[0, :, 0].float()
        weight = pulled(latent, step_of, low=-4, high=3, softness=1 - step / 40)
        torch.testing.assert_close(model.weight.detach(), weight)


def test_bits_follow_units_that_died() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(model, optimizer, counts=COUNTS)
    seen: list[int] = []
    run(model, optimizer, range(STEPS), lambda _: seen.append(levels(model.blocks[0].conv1.weight)))
    assert min(seen[: SCHEDULE.last - 1]) > 16
    _, report = shrinker.finish()
    assert report.counts()["blocks.0.conv1"] == 7
    assert model.blocks[0].conv1.weight.shape == (7, 12, 3, 3)
    assert model.blocks[0].conv2.weight.shape == (12, 7, 3, 3)
    assert report.difference <= 1e-5
    steps = shrinker.state_dict()["rounding"]["steps"]
    for row in report.rounded:
        assert is_on_grid(model.get_submodule(row.layer).weight, steps[row.layer], 4)


def test_a_compiled_model_that_is_cut_at_the_end_keeps_its_grid() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(compiled, optimizer, counts=COUNTS)
    held: list[int] = []

    def each(step: int) -> None:
        shrinker._pace.first_s = 1e6  # compiling again never pays
        if step >= SCHEDULE.last:
            held.append(int((model.blocks[0].conv1.weight.flatten(1) != 0).any(1).sum()))

    run(compiled, optimizer, range(STEPS), each)
    before = shrinker.state_dict()["rounding"]["steps"]["blocks.0.conv1"]
    _, report = shrinker.finish()
    assert max(held) <= 7  # the units that died stay zero on the grid
    assert report.difference <= 1e-5
    assert model.blocks[0].conv1.weight.shape == (7, 12, 3, 3)
    after = shrinker.state_dict()["rounding"]["steps"]["blocks.0.conv1"]
    assert torch.equal(after, before[shrinker.kept()["blocks.0.conv1"]])
    assert is_on_grid(model.blocks[0].conv1.weight, after, 4)


@pytest.mark.parametrize(
    ("stop", "counts"),
    [
        *((stop, COUNTS) for stop in (3, 22, 34, 52, 57)),
        *((stop, None) for stop in (22, 52)),
        *(pytest.param(stop, None, marks=pytest.mark.slow) for stop in (3, 34, 57)),
    ],
)
def test_a_run_that_stops_anywhere_resumes_to_the_same_result(
    stop: int, counts: dict[str, int] | None, tmp_path: Any
) -> None:
    def begin() -> tuple[Convolutional, torch.optim.Optimizer, Shrinker]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        return model, optimizer, attached(model, optimizer, counts=counts)

    model, optimizer, shrinker = begin()
    run(model, optimizer, range(stop))
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    save_state(shrinker.state_dict(), tmp_path)
    run(model, optimizer, range(stop, STEPS))
    whole, wanted = shrinker.finish()

    again, resumed, second = begin()
    second.load_state_dict(load_state(tmp_path))
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, range(stop, STEPS))
    found, report = second.finish()
    assert report.rounded == wanted.rounded
    for (name, a), b in zip(whole.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_closure_sees_the_pulled_weights() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer, bits=2)
    seen: list[int] = []
    for step in range(STEPS):
        x, y = images(16, seed=step)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)  # noqa: B023 - called at once
            loss.backward()
            seen.append(levels(model.blocks[0].conv1.weight))
            return loss

        optimizer.step(closure)
    shrinker.finish()
    assert max(seen[SCHEDULE.hard_step + 1 :]) <= 4
    assert min(seen[: SCHEDULE.first]) > 50


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_scaler_skips_change_no_latent_and_do_not_count(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    shrinker = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    made, skipped, step = 0, 0, 0
    while made < 20:
        x, y = images(16, seed=step)
        is_bad = step % 6 == 4
        latents = {n: t.clone() for n, t in shrinker._parts.rounding._latents.items()}
        loss = functional.cross_entropy(model(x), y) * (torch.inf if is_bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if is_bad:
            for name, latent in latents.items():
                assert torch.equal(shrinker._parts.rounding._latents[name], latent)
        made, skipped, step = made + (not is_bad), skipped + is_bad, step + 1
    assert skipped >= 3
    shrinker._counter.settle()
    assert shrinker.step == 20


def test_accumulated_gradients_count_as_one_step() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(model, optimizer)
    for step in range(2 * STEPS):
        x, y = images(8, seed=step)
        (functional.cross_entropy(model(x), y) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert shrinker.step == STEPS
    assert not shrinker.finish()[1].notes


def test_a_transformer_takes_bits_by_layer() -> None:
    torch.manual_seed(0)
    model = Encoder(width=32, inner=48)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(4, 5, 32)
    shrinker = tersor.train.attach(
        model, optimizer, x, total_steps=STEPS, bits={"up": 2, "down": 3}, schedule=SCHEDULE
    )
    for _ in range(STEPS):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _, report = shrinker.finish()
    assert {row.layer: row.bits for row in report.rounded} == {"up": 2, "down": 3}
    assert levels(model.up.weight) <= 4
    assert levels(model.down.weight) <= 8
    assert levels(model.qkv.weight) > 16


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rounding_what_came_out_to_its_bits_again_loses_nothing(bits: int) -> None:
    """Files pack a weight by the same search: it finds the grid on which the weight lies."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    shrinker = attached(model, optimizer, bits=bits)
    run(model, optimizer, range(STEPS))
    _, report = shrinker.finish()
    for row in report.rounded:
        weight = model.get_submodule(row.layer).weight.detach().flatten(1)[None]
        grid = GroupGrid(bits=bits)
        steps = fit_steps(weight, grid)
        again = dequantize(nearest_codes(weight, steps, grid), steps, grid)
        assert torch.equal(again.float(), weight)


def test_two_bits_of_a_trained_network_beat_rounding_it_afterwards() -> None:
    train, test = load_fashion()
    test = replace(test, images=test.images[:400], labels=test.labels[:400])
    model, plain = load_resnet20().train(), load_resnet20()
    steps = 40
    schedule = Schedule(total_steps=steps, begin=0.05, end=0.5, every=4, hard=0.8)
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    shrinker = tersor.train.attach(
        model, optimizer, test.images[:2], bits=2, total_steps=steps, schedule=schedule
    )
    for step in range(steps):
        index = torch.randint(1200, (16,), generator=torch.Generator().manual_seed(step))
        functional.cross_entropy(model(train.images[index]), train.labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    small, _ = shrinker.finish()
    rounding_of(
        plain, torch.optim.SGD(plain.parameters(), 0.1), Wanted(bits=2), schedule, begin=2
    ).harden()
    assert accuracy(small.eval(), test) > accuracy(plain, test) + 0.1


def test_weights_that_are_no_numbers_stop_the_run_by_name() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    attached(model, optimizer)
    x, y = images(16)

    def train() -> None:
        for _ in range(20):
            (functional.cross_entropy(model(x), y) * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NumericalError, match=r"step 6: the weights of blocks\.0\.conv1"):
        train()


def test_a_model_that_is_changed_after_attach_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    attached(model, optimizer)
    run(model, optimizer, range(10))
    conv = model.blocks[0].conv1
    conv.weight.data = conv.weight.data[:6]
    with pytest.raises(ConfigError, match=r"blocks\.0\.conv1: its weight .* after attach"):
        optimizer.step()


def test_finish_before_the_end_rounds_at_once_and_says_so() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    with pytest.raises(ConfigError, match="is it the one that trains"):
        shrinker.finish()
    run(model, optimizer, range(2))
    _, report = shrinker.finish()
    assert any("after 2 steps" in note and "rounded at once" in note for note in report.notes)
    assert levels(model.blocks[0].conv1.weight) <= 16


def test_a_state_of_other_bits_is_refused() -> None:
    model = network()
    state = attached(model, torch.optim.SGD(model.parameters(), 0.1)).state_dict()
    other = network()
    second = attached(other, torch.optim.SGD(other.parameters(), 0.1), bits=2)
    with pytest.raises(ConfigError, match="other bits; layers that differ"):
        second.load_state_dict(state)
    plain = network()
    third = attached(plain, torch.optim.SGD(plain.parameters(), 0.1), bits=None, counts=COUNTS)
    with pytest.raises(ConfigError, match="other"):
        third.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "wanted one of 4, 3, 2"),
        ({"bits": 1}, "wanted one of 4, 3, 2"),
        ({"bits": {"blocks.0.conv1": 5}}, "wanted one of 4, 3, 2"),
        ({"bits": {"nowhere": 4}}, "'nowhere' can't have few bits: it is no linear layer"),
        ({"bits": {"stem": 4}}, "108 weights: fewer than 1024"),
        ({"keep": ("blocks",)}, "no layer that can have few bits"),
        ({"schedule": Schedule(total_steps=STEPS, end=0.8, every=5, hard=0.1)}, "too small for"),
        ({"counts": COUNTS, "schedule": Schedule(total_steps=60, every=5, hard=0.5)}, "for bits"),
    ],
)
def test_wrong_use_is_refused_with_a_way_out(options: dict[str, Any], words: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=words):
        attached(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def test_layers_that_stay_say_why() -> None:
    model = network()
    model.blocks[0].conv1.weight.requires_grad_(False)
    model.blocks[1].conv2.weight = model.blocks[0].conv2.weight
    some = [p for n, p in model.named_parameters() if n != "blocks.1.conv1.weight"]
    optimizer = torch.optim.SGD(some, 0.1)
    with pytest.raises(ConfigError, match="no layer that can have few bits") as caught:
        attached(model, optimizer)
    for words in ("is frozen", "is tied: blocks.0.conv2.weight", "in no group of the optimizer"):
        assert words in str(caught.value)
    half = network().bfloat16()
    with pytest.raises(ConfigError, match="does not hold code times step"):
        attached(half, torch.optim.SGD(half.parameters(), 0.1), bits={"blocks.0.conv1": 4})


@pytest.mark.parametrize("hard", [0.0, -0.1, 1.1])
def test_a_schedule_has_its_grid_within_the_run(hard: float) -> None:
    with pytest.raises(ConfigError, match="found hard="):
        Schedule(total_steps=STEPS, every=2, hard=hard)
