"""Layers become pairs while a network trains: ranks, optimizers, resuming, the way back, and bad input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.errors import ConfigError, NumericalError
from tersor.train.factorable import find_layers
from tersor.train.factorizer import Factorizer
from tersor.train.fitting import whole_weight
from tersor.train.gathering import rows_of
from tersor.train.probe import Probe
from tersor.train.resuming import load_state, save_state
from tersor.train.schedule import Schedule
from tests.data.zoo import accuracy, load_fashion, load_resnet20
from tests.unit.train.networks import Convolutional, Depthwise, Encoder, images
from tests.unit.train.test_shrinker import OPTIMIZERS
from tests.unit.train.test_structure import probe_of

STEPS = 60
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.6, every=5, epoch=5)
COUNTS = {"blocks.0.conv1": 5, "blocks.1.conv2": 6}


def network() -> Convolutional:
    """The same initial weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutional(width=12)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Factorizer:
    given = {
        "total_steps": STEPS,
        "counts": COUNTS,
        "algorithm": "spectral",
        "schedule": SCHEDULE,
    } | options
    made = tersor.train.attach(model, optimizer, images(4)[0], **given)
    assert isinstance(made, Factorizer)
    return made


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


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_run_ends_with_exactly_the_ranks_and_a_working_network(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    factorizer = attached(model, optimizer)
    run(model, optimizer, range(STEPS))
    x, y = images(64, seed=1000)
    small, report = factorizer.finish()
    with torch.no_grad():
        right = float((small.eval()(x).argmax(1) == y).double().mean())
    assert small is model
    assert right > 0.8
    assert report.ranks() == COUNTS == factorizer.ranks()
    first, last = model.blocks[0].conv1
    assert first.weight.shape[0] == last.weight.shape[1] == 5
    assert report.shrunk_at is not None
    assert SCHEDULE.first <= report.shrunk_at <= SCHEDULE.last
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_after < report.parameters_before
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert set(optimizer.state) <= held
    if kind != "plain":
        assert first.weight in optimizer.state
    assert not optimizer._optimizer_step_pre_hooks
    assert "2 of 6 layers are pairs" in report.describe()
    assert report.as_dict()["factored"][1]["rank"] == 5
    assert {row.reason for row in report.factored if not row.rank} == {"it was given no rank"}


def test_the_pair_is_the_best_of_its_rank_for_what_the_layer_reads() -> None:
    """Against the definition: whitened truncation by a singular value decomposition."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20, bias=False), nn.ReLU(), nn.Linear(20, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # weights stay
    mixed = torch.randn(24, 24)
    schedule = Schedule(total_steps=40, begin=0.0, end=0.5, every=5, epoch=5)
    factorizer = tersor.train.attach(
        model,
        optimizer,
        torch.randn(4, 24),
        total_steps=40,
        counts={"0": 4},
        algorithm="spectral",
        schedule=schedule,
    )
    weight = model[0].weight.detach().double()
    seen = []
    for step in range(40):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)) @ mixed
        if 10 <= step < 15 and not factorizer.is_shrunk:
            seen.append(x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factorizer._shrunk_at == 15  # settled at 10: an epoch of five after the look at 5
    rows = torch.cat(seen).double()
    H = rows.T @ rows / len(rows)
    H += 1e-2 * H.diagonal().mean() * torch.eye(24, dtype=torch.float64)  # few rows
    L = torch.linalg.cholesky(H)
    U, S, V = torch.linalg.svd(weight @ L)
    wanted = (U[:, :4] * S[:4]) @ V[:4] @ torch.linalg.inv(L)
    torch.testing.assert_close(whole_weight(model[0]), wanted, rtol=0, atol=1e-5)


def test_a_bias_takes_up_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))
    dense = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    example = torch.randn(64, 24) + 3
    factorizer = tersor.train.attach(
        model,
        optimizer,
        example,
        total_steps=STEPS,
        counts={"0": 3},
        algorithm="spectral",
        schedule=SCHEDULE,
    )
    for _ in range(STEPS):
        model(example).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factorizer.is_shrunk
    with torch.no_grad():
        found, wanted = model[0](example).mean(0), dense[0](example).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_the_rate_is_warmed_up_again_and_the_scheduler_does_not_see_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = Schedule(total_steps=600, begin=0.02, end=0.05, every=4, epoch=4)
    factorizer = attached(model, optimizer, total_steps=600, schedule=schedule)
    rates: list[float] = []

    def spy(*_: Any) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))

    optimizer.register_step_pre_hook(spy)  # behind ours
    run(model, optimizer, range(40))
    at = factorizer._shrunk_at
    assert at is not None
    wanted = [0.05 * (i + 1) / 7 for i in range(6)]  # 1 % of 600 steps
    torch.testing.assert_close(rates[at : at + 6], wanted)
    assert rates[at - 1] == rates[at + 6] == 0.05
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_ranks_that_never_settle_are_cut_at_the_end_of_the_window() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    factorizer = attached(model, optimizer)
    factorizer._stable.is_settled = lambda _: False  # type: ignore[method-assign]
    run(model, optimizer, range(STEPS))
    _, report = factorizer.finish()
    assert report.shrunk_at == SCHEDULE.last
    assert report.ranks() == COUNTS


def test_stable_ranks_settle_once_weights_stand_still() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    factorizer = attached(model, optimizer)

    def each(step: int) -> None:
        if step == 15:
            optimizer.param_groups[0]["lr"] = 0.0
        if step == 20:
            assert factorizer._cut_at is None
        if step < 15:  # the weights of one layer grow in one direction
            with torch.no_grad():
                model.blocks[0].conv1.weight[0] += 0.05

    run(model, optimizer, range(30), each)
    assert factorizer._cut_at in (30, 35)


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        *(("sgd", stop) for stop in (3, 22, 33, 36, 50)),
        *(("adamw fused", stop) for stop in (22, 36)),
        *(pytest.param("adamw fused", stop, marks=pytest.mark.slow) for stop in (3, 33, 50)),
    ],
)
def test_a_run_that_stops_anywhere_resumes_to_the_same_result(
    stop: int, kind: str, tmp_path: Any
) -> None:
    def begin() -> tuple[Convolutional, torch.optim.Optimizer, Factorizer]:
        model = network()
        optimizer = OPTIMIZERS[kind](model.parameters())
        return model, optimizer, attached(model, optimizer)

    model, optimizer, factorizer = begin()
    run(model, optimizer, range(stop))
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    save_state(factorizer.state_dict(), tmp_path)
    run(model, optimizer, range(stop, STEPS))
    whole, wanted = factorizer.finish()

    again, resumed, second = begin()
    second.load_state_dict(load_state(tmp_path))
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, range(stop, STEPS))
    found, report = second.finish()
    assert report.factored == wanted.factored
    assert report.shrunk_at == wanted.shrunk_at
    assert report.parameters_before == wanted.parameters_before
    assert list(whole.state_dict()) == list(found.state_dict())
    for (name, a), b in zip(whole.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_all_phases_are_among_those_that_stop() -> None:
    """Dense, gathering, at the cut, and after: what the stops above stand for."""
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    factorizer = attached(model, optimizer)
    phases = {}

    def each(step: int) -> None:
        is_gathering = factorizer._gathering.is_on
        phases[step + 1] = "done" if factorizer.is_shrunk else "gather" if is_gathering else "dense"

    run(model, optimizer, range(STEPS), each)
    stops = [3, 22, 33, 36, 50]
    assert {phases[s] for s in stops} == {"dense", "gather", "done"}, phases


def test_a_closure_and_accumulated_gradients() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    factorizer = attached(model, optimizer)
    for step in range(STEPS):
        x, y = images(16, seed=step)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.zeros(())
            for part in (slice(0, 8), slice(8, 16)):
                loss = functional.cross_entropy(model(x[part]), y[part]) / 2  # noqa: B023
                loss.backward()
            return loss

        optimizer.step(closure)
    assert factorizer.step == STEPS
    assert factorizer.finish()[1].ranks() == COUNTS


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    factorizer = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(40):
        x, y = images(16, seed=step)
        loss = functional.cross_entropy(model(x), y) * (torch.inf if step % 7 == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    factorizer._counter.settle()
    assert factorizer.is_shrunk
    assert 34 <= factorizer.step <= 36  # six are skipped; those after the pairs are counted
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_compiled_model_goes_on_with_its_pairs() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    factorizer = attached(compiled, optimizer)
    run(compiled, optimizer, range(STEPS))
    small, report = factorizer.finish()
    assert small is model
    assert report.ranks() == COUNTS
    assert not any("the example had to do" in note for note in report.notes)
    x = images(4)[0]
    small.eval()
    torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.parametrize("bad", ["size", "no numbers"])
def test_pairs_that_the_outputs_do_not_stand_are_undone(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    factorizer = attached(model, optimizer)
    if bad == "size":
        monkeypatch.setattr("tersor.train.factoring.WORST", -1.0)
    else:
        run_probe = Probe.run
        calls = []

        def broken(self: Probe, asked: nn.Module) -> list[Tensor]:
            calls.append(asked)
            found = run_probe(self, asked)
            return found if len(calls) == 1 else [t * torch.nan for t in found]

        monkeypatch.setattr(Probe, "run", broken)
    before = dict(model.named_parameters())
    run(model, optimizer, range(STEPS))
    _, report = factorizer.finish()
    assert report.ranks() == {}
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in model.named_parameters())
    assert all(p in optimizer.state for p in model.parameters())  # nothing began anew
    assert report.parameters_after == report.parameters_before
    assert report.shrunk_at is None
    assert [n for n in report.notes if "undone" in n]
    assert {r.reason for r in report.factored if r.layer in COUNTS} == {
        "undone: the outputs did not stand it"
    }


def test_a_transformer_and_names_in_the_optimizers_groups() -> None:
    torch.manual_seed(0)
    model = Encoder(width=32, inner=64)
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-3)
    x = torch.randn(4, 5, 32)
    factorizer = tersor.train.attach(
        model,
        optimizer,
        x,
        total_steps=STEPS,
        counts={"up": 8, "down": 8},
        algorithm="spectral",
        schedule=SCHEDULE,
    )
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    small, report = factorizer.finish()
    assert report.ranks() == {"up": 8, "down": 8}
    assert small.up[0].weight.shape == (8, 32)
    assert small.up[1].weight.shape == (64, 8)
    assert losses[-1] < losses[0]
    assert {r.form for r in report.factored if r.rank} == {"output"}
    (group,) = optimizer.param_groups
    assert sorted(group["param_names"]) == sorted(n for n, _ in small.named_parameters())
    named = dict(small.named_parameters())
    assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_resnet20_trains_on_with_a_quarter_of_its_weights() -> None:
    train, test = load_fashion()
    model = load_resnet20().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    counts = {f"layers.{i}.conv{j}": 16 for i in (6, 7, 8) for j in (1, 2)}
    steps = 40
    schedule = Schedule(total_steps=steps, begin=0.1, end=0.5, every=4, epoch=4)
    factorizer = tersor.train.attach(
        model,
        optimizer,
        test.images[:16],
        total_steps=steps,
        counts=counts,
        algorithm="spectral",
        schedule=schedule,
    )
    at_once = 0.0
    for step in range(steps):
        index = torch.randint(1200, (32,), generator=torch.Generator().manual_seed(step))
        functional.cross_entropy(model(train.images[index]), train.labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if factorizer._shrunk_at == step + 1:
            at_once = accuracy(model.eval(), test)
            model.train()
    small, report = factorizer.finish()
    assert report.ranks() == counts
    assert report.parameters_after < 0.55 * report.parameters_before
    assert accuracy(small.eval(), test) > max(0.7, at_once - 0.02)


def test_layers_that_can_be_no_pair_say_why() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.third = nn.Linear(16, 16)
            self.third.weight = self.second.weight
            self.frozen = nn.Linear(16, 16).requires_grad_(False)
            self.tiny = nn.Linear(16, 1)
            self.unused = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.linear(self.first(x), self.first.weight)
            return self.tiny(self.frozen(self.third(self.second(y))))

    model = Reads()
    layers = find_layers(model, None, probe_of(torch.randn(2, 16)))
    reasons = {h.name: h.reason for h in layers.held}
    assert "forward() fails with a pair in its place" in reasons["first"]
    assert "is tied: second.weight, third.weight" in reasons["second"]
    assert "is frozen" in reasons["frozen"]
    assert reasons["tiny"] == "no pair of it is smaller"
    assert not layers.by_name
    grouped = find_layers(Depthwise(), None, probe_of(torch.randn(2, 3, 8, 8)))
    assert "12 groups" in {h.name: h.reason for h in grouped.held}["each"]
    with pytest.raises(ConfigError, match="no layer that can become a pair in Reads"):
        tersor.train.attach(
            model,
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
            torch.randn(2, 16),
            total_steps=STEPS,
            counts={"first": 2},
            algorithm="spectral",
            schedule=SCHEDULE,
        )


def test_rows_of_a_layer_are_its_unfolded_input() -> None:
    conv = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
    x = torch.randn(2, 3, 7, 6)
    rows = rows_of(x, conv)[:, 0]
    found = rows @ conv.weight.detach().flatten(1).T
    wanted = conv(x).detach().movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(found, wanted)
    linear = nn.Linear(4, 2)
    assert rows_of(torch.randn(3, 5000, 4), linear).shape == (2048, 1, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"counts": {"blocks.0.conv1": 40}}, "found rank 40, wanted 1 to"),
        ({"counts": {"blocks.0.conv1": 0}}, "found rank 0, wanted 1 to"),
        ({"counts": {"nowhere": 2}}, "'nowhere' can't become a pair: there is no such layer"),
        ({"counts": {"blocks.0.bn1": 2}}, "no such layer"),
        ({"counts": {}}, "found none, wanted {layer: rank}"),
        ({"bits": 4}, "algorithm='spectral' and bits"),
        ({"counts": None}, "neither"),
        ({"keep": ("blocks",)}, "can't become a pair: named in keep"),
        ({"total_steps": 10, "schedule": None}, "total_steps=10 is too small"),
    ],
)
def test_wrong_use_is_refused_with_a_way_out(options: dict[str, Any], words: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=words):
        attached(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def test_weights_that_are_no_numbers_stop_the_run_by_name(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.train.rescue.SECONDS", 0.0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    attached(model, optimizer, rescue=tmp_path)
    run(model, optimizer, range(7))
    x, y = images(16)

    def train() -> None:
        for _ in range(20):
            (functional.cross_entropy(model(x), y) * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NumericalError, match=r"step 10: .*blocks\.0\.conv1.*after step 5, is in"):
        train()
    assert tersor.train.rescued(tmp_path)["shrinker"]["step"] == 5


def test_finish_before_the_end_says_so() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    factorizer = attached(model, optimizer)
    with pytest.raises(ConfigError, match="is it the one that trains"):
        factorizer.finish()
    run(model, optimizer, range(2))
    _, report = factorizer.finish()
    assert report.ranks() == COUNTS
    assert any("after 2 steps" in note for note in report.notes)
    assert any("the example had to do" in note for note in report.notes)


def test_a_state_of_another_structure_or_algorithm_is_refused() -> None:
    model = network()
    state = attached(model, torch.optim.SGD(model.parameters(), 0.1)).state_dict()
    other = Convolutional(width=10)
    second = attached(other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ConfigError, match="another structure; layers that differ"):
        second.load_state_dict(state)
    with pytest.raises(ConfigError, match="version"):
        second.load_state_dict(state | {"version": 99})
    with pytest.raises(ConfigError, match="found algorithm 'regrow'"):
        second.load_state_dict(state | {"algorithm": "regrow"})
    third = network()
    longer = attached(
        third,
        torch.optim.SGD(third.parameters(), 0.1),
        total_steps=600,
        schedule=Schedule(total_steps=600),
    )
    with pytest.raises(ConfigError, match="total_steps"):
        longer.load_state_dict(state)


@pytest.mark.parametrize("epoch", [0, -3, 2.5])
def test_an_epoch_has_steps(epoch: Any) -> None:
    with pytest.raises(Exception, match="epoch"):
        Schedule(total_steps=STEPS, every=2, epoch=epoch)
