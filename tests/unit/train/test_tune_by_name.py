"""The switches that change convergence: only by name, and in a form that a caller can go on with."""

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from tersor.core.errors import ConfigError
from tersor.train.switches_optimizer import (
    FusedOptimizer,
    Muon,
    ScheduleFree,
    hidden_matrices,
    require,
)
from tersor.train.tune_arena import Arena
from tersor.train.tune_session import Tuning
from tersor.train.tune_state import Snapshot
from tersor.train.tune_steps import Job, Runner, plain
from tersor.train.tune_trials import Trials
from tests.unit.train.test_tune import QUICK_RULES, tuned
from tests.unit.train.test_tune_switches import assert_same
from tests.unit.train.tuning import job, told

RULES = QUICK_RULES
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


@pytest.fixture(autouse=True)
def still_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look sees no difference, whatever else the machine does."""
    monkeypatch.setattr(Trials, "look", lambda _: 0.01)


class Reader(nn.Module):
    """An embedding, hidden linear layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.head(self.down(torch.relu(self.up(self.table(tokens)))).mean(1))
        return x


def task(kind: Any = AdamW, **changes: Any) -> Job:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = Reader()
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(5, (6, 4), generator=generator) for _ in range(4)]
    return job(
        model,
        kind(model.parameters(), 1e-2),
        data,
        step=lambda net, x: nn.functional.cross_entropy(net(x), x[:, 0]),
        **changes,
    )


def test_hidden_matrices_are_linear_weights_without_table_and_head() -> None:
    found = task()
    model: Any = found.model
    assert [id(p) for p in hidden_matrices(model, found.optimizer)] == [
        id(model.up.weight), id(model.down.weight),
    ]  # fmt: skip
    model.up.weight = model.table.weight  # shared with an embedding
    model.down.weight.requires_grad_(False)
    assert hidden_matrices(model, found.optimizer) == []


@needs_muon
def test_muon_takes_the_matrices_and_follows_the_rates() -> None:
    found = task()
    model: Any = found.model
    Runner(found, plain(found))(found.pool.batches[0])
    before = copy.deepcopy((found.model.state_dict(), found.optimizer.state_dict()))
    arena = Arena(found, Snapshot(model, found.optimizer), lambda: 0.0)
    switch = Muon()
    recipe = arena.stay((switch,))
    own, muon = recipe.optimizers
    assert own is found.optimizer
    matrices = muon.param_groups[0]["params"]
    assert [id(p) for p in matrices] == [id(model.up.weight), id(model.down.weight)]
    rest = {id(p) for p in own.param_groups[0]["params"]}
    assert not rest & {id(p) for p in matrices}
    assert len(rest) + len(matrices) == len(list(model.parameters()))
    own.state_dict()  # can be saved: nothing is left of what moved
    weights = [p.detach().clone() for p in model.parameters()]
    own.param_groups[0]["lr"] = 0.5
    arena.step()
    assert muon.param_groups[0]["lr"] == 0.5
    moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)]
    assert all(moved)
    arena.leave()
    assert_same(found.model.state_dict(), before[0])
    assert_same(found.optimizer.state_dict(), before[1])


@needs_muon
def test_muon_makes_steps_of_adams_size() -> None:
    found = task()
    weight: Any = found.model.up.weight
    arena = Arena(found, Snapshot(found.model, found.optimizer), lambda: 0.0)
    arena.stay((Muon(),))
    before = weight.detach().clone()
    arena.step()
    change = (weight.detach() - before * (1 - 1e-2 * 1e-2)).square().mean().sqrt()
    # 0.2 sqrt(max) times a matrix with singular values near 1, of size 0.2 each; Newton-Schulz leaves
    # them within a factor of two.
    assert 0.5 * 0.2e-2 < float(change) < 2 * 0.2e-2


@needs_muon
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": SGD}, "the optimizer is SGD"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "no use for a GradScaler"),
        ({}, ""),
    ],
)
def test_muon_is_refused_beside_other_steps(changes: dict[str, Any], reason: str) -> None:
    found = task(**changes)
    refusal = Muon().refusal(found, plain(found))
    assert reason in refusal
    assert bool(refusal) == bool(reason)


def test_muon_is_refused_without_matrices_or_without_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)  # a head alone
    found = job(model, Adam(model.parameters()), [torch.ones(2, 2)])
    if hasattr(torch.optim, "Muon"):
        assert "no weight of a hidden linear layer" in Muon().refusal(found, plain(found))
        monkeypatch.delattr(torch.optim, "Muon")
    assert "has no torch.optim.Muon" in Muon().refusal(found, plain(found))


@needs_muon
def test_muon_is_on_by_name_whatever_its_time_and_others_are_compared_with_it() -> None:
    found = task()
    seen: list[list[float]] = []

    def measure(calls: Any, protocol: Any) -> Any:
        times = (10.0, 12.0) if not seen else (12.0, 11.0, 11.5)
        seen.append(list(times))
        return told(*times)(calls, protocol)

    names = ("muon", "fused_optimizer")
    recipe, report = Tuning(measure=measure, **RULES).tuned(found, names)
    assert [s.label for s in report.on] == ["muon", "fused_optimizer (fused)"]
    muon, fused = report.on
    assert muon.loss is not None
    assert muon.loss.kind == "by name"
    assert fused.loss is not None
    assert fused.loss.plain_mean == pytest.approx(muon.loss.mean)  # not the loss of Adam alone
    assert len(recipe.optimizers) == 2
    assert not any("not in the optimizer" in note for note in report.notes)  # Muon has them
    assert found.optimizer.param_groups[0]["fused"] is True


def test_what_changes_convergence_is_never_automatic() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3))
    report = tuned(model, switches=["fused_optimizer"], optimizer=AdamW(model.parameters())).report
    assert not {s.name for s in report.switches} & {"muon", "schedule_free"}


# Schedule-Free: a stand-in with the package's interface; the real one is tried by hand


class Free(Optimizer):
    """Steps like SGD, has modes, keeps values in its groups."""

    def __init__(self, params: Any, lr: float = 1.0, **others: Any) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False, **others})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                self.state[p]["z"] = p.clone()
                p.sub_(p.grad, alpha=group["lr"])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from importlib.machinery import ModuleSpec

    made = ModuleType("schedulefree")
    made.__spec__ = ModuleSpec("schedulefree", None)
    made.AdamWScheduleFree = type("AdamWScheduleFree", (Free,), {})  # type: ignore[attr-defined]
    made.SGDScheduleFree = type("SGDScheduleFree", (Free,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "schedulefree", made)
    return made


@pytest.mark.parametrize(("kind", "name"), [(AdamW, "AdamWScheduleFree"), (SGD, "SGDScheduleFree")])
def test_schedule_free_replaces_the_optimizer(package: ModuleType, kind: Any, name: str) -> None:
    found = task(kind)
    arena = Arena(found, Snapshot(found.model, found.optimizer), lambda: 0.0)
    recipe = arena.stay((ScheduleFree(),))
    (free,) = recipe.optimizers
    assert type(free) is getattr(package, name)
    group = free.param_groups[0]
    assert (group["lr"], group["k"], group["train_mode"]) == (1e-2, 0, True)
    assert ("momentum" in group) is False  # SGD's 0 is not its own
    arena.step()
    assert group["k"] == 1
    arena.reset()
    assert (group["k"], group["train_mode"], dict(free.state)) == (0, True, {})
    assert "has its own" not in FusedOptimizer("fused").refusal(found, plain(found))
    assert f"is {name} now" in FusedOptimizer("fused").refusal(found, recipe)


@pytest.mark.usefixtures("package")
def test_schedule_free_evaluates_in_its_other_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    fast = tuned(model, switches=["schedule_free"], optimizer=SGD(model.parameters(), 0.1))
    (free,) = fast.optimizers
    assert [s.name for s in fast.report.on] == ["schedule_free"]
    with fast.evaluating():
        assert free.param_groups[0]["train_mode"] is False
    assert free.param_groups[0]["train_mode"] is True


def test_other_optimizers_have_no_modes_and_evaluate_as_they_are() -> None:
    with tuned(switches=[]).evaluating():
        pass


@pytest.mark.usefixtures("package")
def test_schedule_free_takes_no_scheduler() -> None:
    found = task()
    found = task(scheduler=StepLR(found.optimizer, 1))
    with pytest.raises(ConfigError, match="takes the place of a scheduler"):
        require(("schedule_free",), found)
    require(("muon",), found)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (torch.optim.RMSprop, {}, "there is none of RMSprop"),
        (lambda p, lr: Adam(p, lr, weight_decay=0.1), {}, "use AdamW's"),
        (lambda p, lr: AdamW(p, torch.tensor(lr)), {}, "the rate is a tensor"),
        (AdamW, {"scaler": torch.amp.GradScaler("cpu")}, "know no GradScaler"),
        (AdamW, {}, ""),
    ],
)
def test_schedule_free_is_refused_where_it_has_no_form(
    kind: Any, changes: dict[str, Any], reason: str
) -> None:
    found = task(kind, **changes)
    refusal = ScheduleFree().refusal(found, plain(found))
    assert reason in refusal
    assert bool(refusal) == bool(reason)
