"""Whole runs of a small network: masks, latents, the cut, the optimizers that people use, and bad input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.errors import ConfigError, NumericalError
from tersor.train.literals import macs_share
from tersor.train.resuming import FILE, load_state, save_state
from tersor.train.schedule import Schedule
from tersor.train.shrinker import Shrinker
from tersor.train.structure import find_structure
from tests.unit.train.networks import Convolutional, Encoder, images

STEPS = 60
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.6, every=5)
COUNTS = {"blocks.0.conv1": 3, "blocks.1.conv1": 5}


def network(seed: int = 0) -> Convolutional:
    """The same initial weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Convolutional()


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Shrinker:
    given = {"total_steps": STEPS, "counts": COUNTS, "schedule": SCHEDULE} | options
    return tersor.train.attach(model, optimizer, images(4)[0], **given)


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    each: Callable[[int], None] = lambda _: None,
) -> None:
    """The usual loop; the same batches whatever step it begins with."""
    for step in steps:
        x, y = images(16, seed=step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        each(step)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, 3e-3, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 3e-3, foreach=True, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
    "plain": lambda p: torch.optim.SGD(p, 0.05),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_run_ends_with_exactly_the_counts_and_a_working_network(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    shrinker = attached(model, optimizer)
    run(model, optimizer, range(STEPS))
    x, y = images(64, seed=1000)

    def validate(small: nn.Module) -> float:
        with torch.no_grad():
            return float((small.eval()(x).argmax(1) == y).double().mean())

    small, report = shrinker.finish(validate)
    assert small is model
    assert report.counts()["blocks.0.conv1"] == 3
    assert model.blocks[0].conv1.weight.shape == (3, 8, 3, 3)
    assert model.blocks[1].conv2.weight.shape == (8, 5, 3, 3)
    assert report.shrunk_at == SCHEDULE.last
    assert report.difference <= 1e-5
    assert report.validated is not None
    assert report.validated > 0.8
    assert report.parameters_after < report.parameters_before
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.numel() > 1:
                assert value.shape == parameter.shape
    assert not optimizer._optimizer_step_pre_hooks
    assert report.as_dict()["groups"][0]["units"] == 8


@pytest.mark.parametrize("algorithm", ["ramp", "prox"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_other_algorithms_end_with_the_counts_too(algorithm: str, kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    shrinker = attached(model, optimizer, algorithm=algorithm)
    norms: list[float] = []

    def each(step: int) -> None:
        if step < SCHEDULE.last - 1:
            gone = shrinker._algorithm.dead.get("blocks.0.conv1")
            if gone is not None:
                norms.append(float(model.blocks[0].bn1.weight.detach()[gone].abs().mean()))

    run(model, optimizer, range(STEPS), each)
    x, y = images(64, seed=1000)
    small, report = shrinker.finish()
    with torch.no_grad():
        right = float((small.eval()(x).argmax(1) == y).double().mean())
    assert report.algorithm == algorithm
    assert report.counts()["blocks.0.conv1"] == 3
    assert report.difference <= 1e-5
    assert right > 0.8
    assert norms[-1] < 0.9 * max(norms)  # they fade before they are cut


def test_a_fading_units_moments_fade_with_it() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    shrinker = attached(model, optimizer, algorithm="ramp")
    run(model, optimizer, range(SCHEDULE.first + 5))
    ramp = shrinker._algorithm
    fading = ramp.dead["blocks.0.conv1"] & ~ramp._gone.get(
        "blocks.0.conv1", torch.zeros(8, dtype=torch.bool)
    )
    assert fading.any()
    weight = model.blocks[0].bn1.weight
    before = optimizer.state[weight]["exp_avg_sq"][fading].clone()
    step, length = ramp._step, ramp.length
    ramp.after(reveal=False)
    left = length - step
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg_sq"][fading], before * (left - 1) / left
    )


def test_dead_units_are_zero_between_steps_and_more_of_them_die() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    shrinker = attached(model, optimizer)
    counts: list[int] = []

    def each(step: int) -> None:
        block = model.blocks[0]
        if shrinker.is_shrunk or SCHEDULE.is_look(step + 2):  # then the latents are in place
            return
        gone = [i for i in range(8) if i not in shrinker.kept()["blocks.0.conv1"].tolist()]
        counts.append(len(gone))
        assert not block.conv1.weight[gone].any()
        assert not block.bn1.weight[gone].any()
        assert not block.bn1.bias[gone].any()
        assert int((block.conv1.weight.flatten(1) != 0).any(1).sum()) == 8 - len(gone)

    run(model, optimizer, range(SCHEDULE.last), each)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] >= 4


def test_latents_train_at_the_masked_weights() -> None:
    """The definition: z <- SGD(z, gradient at the masked weights), by plain loops."""
    made = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model = copy.deepcopy(made)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = Schedule(total_steps=40, begin=0.0, end=1.0, every=8)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    shrinker = tersor.train.attach(
        model, optimizer, x, total_steps=40, counts={"0": 2}, schedule=schedule
    )
    seen: list[Tensor] = []  # the masks after each step
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        flags = torch.zeros(6)
        flags[shrinker.kept()["0"]] = 1.0
        seen.append(flags)
    shrinker._algorithm.reveal()

    latents = [p.detach().clone() for p in made.parameters()]
    mask = torch.ones(6)
    for step, after in enumerate(seen):
        is_look = schedule.is_look(step + 1)
        now = torch.ones(6) if is_look else mask
        weights = [z.clone() for z in latents]
        weights[0] *= now[:, None]
        weights[1] *= now
        weights = [w.requires_grad_() for w in weights]
        y = torch.relu(x @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        gradients = torch.autograd.grad(y.square().mean(), weights)
        latents = [z - 0.1 * g for z, g in zip(latents, gradients, strict=True)]
        mask = after
    for found, wanted in zip(model.parameters(), latents, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
    assert int(mask.sum()) < 6


def test_a_unit_that_died_comes_back_where_its_score_is_better() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    ever: set[int] = set()
    now: list[set[int]] = []

    def each(_: int) -> None:
        if not shrinker.is_settled:
            gone = set(range(8)) - set(shrinker.kept()["blocks.0.conv1"].tolist())
            if gone and len(now) == 3:  # make a dead unit matter
                worst = next(iter(gone))
                shrinker._scores.values["blocks.0.conv1"][worst] += 1e6
            now.append(gone)
            ever.update(gone)

    run(model, optimizer, range(SCHEDULE.last), each)
    assert ever - now[-1]


def test_decoupled_decay_does_not_shrink_latents() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.5)
    shrinker = attached(model, optimizer)
    run(model, optimizer, range(SCHEDULE.first + 5))
    regrow = shrinker._algorithm
    dead = regrow.dead["blocks.0.conv1"]
    assert dead.any()
    weight = model.blocks[0].conv1.weight
    before = regrow._latents[weight].clone()
    alive_before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.state.clear()
    optimizer.step()
    regrow.reveal()
    torch.testing.assert_close(weight.detach()[dead], before[dead])
    torch.testing.assert_close(weight.detach()[~dead], alive_before[~dead] * (1 - 1e-3 * 0.5))


def test_a_closure_sees_the_masked_weights() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    alive: list[int] = []
    for step in range(STEPS):
        x, y = images(16, seed=step)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)  # noqa: B023 - called at once
            loss.backward()
            alive.append(int(model.blocks[0].bn1.weight.count_nonzero()))
            return loss

        optimizer.step(closure)
    _, report = shrinker.finish()
    assert report.counts()["blocks.0.conv1"] == 3
    assert min(alive) == 3
    looks = [n for i, n in enumerate(alive[: SCHEDULE.last], 1) if SCHEDULE.is_look(i)]
    assert set(looks) == {8}  # a look is at the latents


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
    assert shrinker.finish()[1].shrunk_at == SCHEDULE.last


def test_a_compiled_model_goes_on_after_the_cut() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(compiled, optimizer)
    shrinker._pace.first_s = -1e6  # compiling again costs nothing
    run(compiled, optimizer, range(SCHEDULE.last))
    shrinker._pace.first_s = -1e6
    run(compiled, optimizer, range(SCHEDULE.last, STEPS))
    small, report = shrinker.finish()
    assert small is model
    assert report.counts()["blocks.1.conv1"] == 5
    x = images(4)[0]
    torch.testing.assert_close(compiled(x), small(x))


def test_a_compiled_model_stays_as_it_is_where_compiling_again_does_not_pay() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(compiled, optimizer)

    def each(step: int) -> None:
        shrinker._pace.first_s = 1e6
        if step >= SCHEDULE.last:  # chosen, held at zero, not cut
            assert len(model.blocks[0].bn1.weight) == 8
            assert int(model.blocks[0].bn1.weight.count_nonzero()) == 3

    run(compiled, optimizer, range(STEPS), each)
    _, report = shrinker.finish()
    assert len(model.blocks[0].bn1.weight) == 3
    assert report.difference <= 1e-5
    assert any("stays compiled at its old size" in note for note in report.notes)


def test_a_cut_that_changes_the_outputs_is_undone_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tersor.train.committing.TOLERANCE", -1.0)  # no difference is small enough
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(model, optimizer)
    run(model, optimizer, range(STEPS))
    _, report = shrinker.finish()
    assert report.counts()["blocks.0.conv1"] == 8 == len(model.blocks[0].bn1.weight)
    assert report.parameters_after == report.parameters_before
    assert int(model.blocks[0].bn1.weight.count_nonzero()) == 3  # at zero, and held there
    assert report.shrunk_at is None
    assert [n for n in report.notes if "undone" in n] == [report.notes[-1]]


def test_multiply_accumulates_of_a_cut_are_counted() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    axes = find_structure(model, torch.ones(2, 6)).axes
    assert macs_share(axes, {"0": torch.arange(2)}) == (6 * 2 + 2 * 4) / (6 * 8 + 8 * 4)


def test_a_loss_that_is_still_at_hand_stops_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    losses = []  # the graph of every step lives on
    for step in range(SCHEDULE.last + 3):
        x, y = images(16, seed=step)
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert shrinker.is_shrunk


def test_neurons_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(4, 5, 16)
    shrinker = tersor.train.attach(
        model, optimizer, x, total_steps=STEPS, counts={"up": 8}, schedule=SCHEDULE
    )
    for _ in range(STEPS):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small, report = shrinker.finish()
    assert small.up.weight.shape == (8, 16)
    assert report.difference <= 1e-5


@pytest.mark.parametrize(
    ("algorithm", "stop"),
    [
        *(("regrow", stop) for stop in (3, 22, 34, 45)),
        *((algorithm, 22) for algorithm in ("ramp", "prox")),
        *(
            pytest.param(algorithm, stop, marks=pytest.mark.slow)
            for algorithm in ("ramp", "prox")
            for stop in (3, 34, 45)
        ),
    ],
)
def test_a_run_that_stops_anywhere_resumes_to_the_same_result(algorithm: str, stop: int) -> None:
    def begin() -> tuple[Convolutional, torch.optim.Optimizer, Shrinker]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        return model, optimizer, attached(model, optimizer, algorithm=algorithm)

    model, optimizer, shrinker = begin()
    run(model, optimizer, range(stop))
    saved = copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "shrinker": shrinker.state_dict(),
        }
    )
    run(model, optimizer, range(stop, STEPS))
    whole, wanted = shrinker.finish()

    again, resumed, second = begin()
    second.load_state_dict(saved["shrinker"])
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, range(stop, STEPS))
    found, report = second.finish()
    assert report.counts() == wanted.counts()
    for (name, a), b in zip(whole.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_goes_through_a_file_without_code(tmp_path: Any) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = attached(model, optimizer)
    run(model, optimizer, range(22))
    save_state(shrinker.state_dict(), tmp_path)
    state = load_state(tmp_path)
    other = network()
    second = attached(other, torch.optim.AdamW(other.parameters(), 3e-3))
    second.load_state_dict(state)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert second.step == 22
    assert {n: k.tolist() for n, k in second.kept().items()} == {
        n: k.tolist() for n, k in shrinker.kept().items()
    }


def test_a_state_of_another_structure_or_run_is_refused() -> None:
    model = network()
    state = attached(model, torch.optim.SGD(model.parameters(), 0.1)).state_dict()
    other = Convolutional(width=6)
    second = tersor.train.attach(
        other,
        torch.optim.SGD(other.parameters(), 0.1),
        images(4)[0],
        total_steps=STEPS,
        counts={},
        schedule=SCHEDULE,
    )
    with pytest.raises(ConfigError, match="another structure"):
        second.load_state_dict(state)
    with pytest.raises(ConfigError, match="version"):
        second.load_state_dict(state | {"version": 99})
    third = network()
    longer = attached(
        third,
        torch.optim.SGD(third.parameters(), 0.1),
        total_steps=600,
        schedule=Schedule(total_steps=600),
    )
    with pytest.raises(ConfigError, match="total_steps"):
        longer.load_state_dict(state)


def test_gradients_that_are_no_numbers_stop_the_run_by_name() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    attached(model, optimizer)
    x, y = images(16)

    def train() -> None:
        for _ in range(10):
            (functional.cross_entropy(model(x), y) * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NumericalError, match=r"step 5: the gradients of .*blocks\.0\.conv1"):
        train()


def test_the_last_sound_state_is_on_disk_when_gradients_are_no_numbers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.train.rescue.SECONDS", 0.0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    attached(model, optimizer, rescue=tmp_path)
    run(model, optimizer, range(17))
    x, y = images(16)

    def diverge() -> None:
        for _ in range(5):
            (functional.cross_entropy(model(x), y) * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NumericalError, match="sound state, after step 15, is in"):
        diverge()

    again = network()
    resumed = torch.optim.AdamW(again.parameters(), 3e-3)
    shrinker = attached(again, resumed)
    found = tersor.train.rescued(tmp_path)
    shrinker.load_state_dict(found["shrinker"])
    again.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    assert shrinker.step == 15
    run(again, resumed, range(15, STEPS))
    small, report = shrinker.finish()
    assert report.counts()["blocks.0.conv1"] == 3
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())


def test_a_model_that_is_changed_after_attach_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    attached(model, optimizer)
    conv = model.blocks[0].conv1
    conv.weight.data = conv.weight.data[:6]
    conv.weight.grad = torch.zeros_like(conv.weight)

    def train() -> None:
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()

    with pytest.raises(ConfigError, match="after attach"):
        train()


def test_finish_before_the_end_says_so() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    run(model, optimizer, range(22))
    _, report = shrinker.finish()
    assert report.counts()["blocks.0.conv1"] == 3
    assert any("after 22 steps" in note for note in report.notes)


def test_finish_without_a_step_says_which_optimizer() -> None:
    model = network()
    shrinker = attached(model, torch.optim.SGD(model.parameters(), 0.05))
    with pytest.raises(ConfigError, match="is it the one that trains"):
        shrinker.finish()


def test_a_low_rate_at_the_cut_is_noted() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    shrinker = attached(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, SCHEDULE.last)
    run(model, optimizer, range(STEPS), lambda _: schedule.step())
    _, report = shrinker.finish()
    assert report.rate_share < 0.5
    assert any("of its peak" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"counts": None}, "neither"),
        ({"target": tersor.Target(speedup=2)}, "both"),
        ({"counts": {"nowhere": 3}}, "no width that may shrink"),
        ({"counts": {"blocks.0.conv1": 9}}, "wanted 1 to 8"),
        ({"counts": {"blocks.0.conv1": 0}}, "wanted 1 to 8"),
        ({"total_steps": 50}, "wanted one"),
        ({"algorithm": "magic"}, "one of regrow, ramp, prox"),
        ({"counts": None, "target": tersor.Target(drop_points=1.0)}, "promises no quality"),
    ],
)
def test_wrong_use_is_refused_with_a_way_out(options: dict[str, Any], words: str) -> None:
    model = network()
    with pytest.raises(tersor.TersorError, match=words):
        attached(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def test_another_models_optimizer_and_a_second_shrinker_are_refused() -> None:
    model, other = network(), network()
    with pytest.raises(ConfigError, match="none of the model's parameters"):
        attached(model, torch.optim.SGD(other.parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached(model, optimizer)
    with pytest.raises(ConfigError, match="a shrinker already"):
        attached(model, optimizer)


def test_parameters_outside_of_the_optimizer_are_named() -> None:
    model = network()
    some = [p for n, p in model.named_parameters() if not n.startswith("blocks.0.bn1")]
    with pytest.raises(ConfigError, match=r"blocks\.0\.bn1\.bias makes units"):
        attached(model, torch.optim.SGD(some, 0.1))


def test_a_model_without_widths_says_what_holds_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="no width that may shrink"):
        tersor.train.attach(
            model, optimizer, torch.ones(2, 4), total_steps=STEPS, counts={}, schedule=SCHEDULE
        )
