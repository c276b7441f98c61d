"""What attach meets in models and loops that are not plain: layers beside forward, keep, heads in turn, rounding."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.errors import ConfigError, NumericalError
from tersor.train.arguments import check_kinds, checked_counts
from tersor.train.schedule import Schedule
from tersor.train.shrinker import Shrinker
from tersor.train.structure import find_structure

STEPS = 60
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def attached(model: nn.Module, counts: dict[str, int] | None = None, **options: object) -> Shrinker:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), 0.05)
    found = tersor.train.attach(
        model,
        optimizer,  # type: ignore[arg-type]
        options.pop("example", torch.randn(4, 6)),
        counts=counts,
        total_steps=STEPS,
        schedule=Schedule(total_steps=STEPS, every=4),
        **options,  # type: ignore[arg-type]
    )
    assert isinstance(found, Shrinker)
    return found


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(model(x), y)


def trained(shrinker: Shrinker, loss: Loss = plain_loss, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = shrinker._parts.optimizer
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        loss(shrinker.model, x, x[:, :3]).backward()
        optimizer.step()


def chain(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, 3)
    )


class Aux(nn.Module):
    """A second head that only training uses, inside of forward or called by the loss."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.first, self.second, self.aux = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(12, 3)
        self.head, self.inside = nn.Linear(10, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        out: Tensor = self.head(self.second(h).relu())
        return out + self.aux(h) if self.inside and self.training else out


def test_a_width_that_only_training_reads_elsewhere_is_held_and_the_others_shrink() -> None:
    shrinker = attached(Aux(inside=True), {"second": 5})
    (held,) = [h for h in shrinker._parts.structure.held if h.name == "first"]
    assert "in training mode" in held.reason
    assert shrinker._parts.structure.unread == ()
    trained(shrinker)
    small, report = shrinker.finish()
    assert small.second.out_features == 5
    assert report.shrunk_at == 24


def test_a_layer_that_only_the_loss_calls_trains_on_to_the_end() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, Aux)
        return plain_loss(model, x, y) + model.aux(model.first(x).relu()).square().mean()

    shrinker = attached(Aux(inside=False), {"first": 6})
    trained(shrinker, loss)
    assert shrinker.is_settled
    assert not shrinker.is_shrunk
    small, report = shrinker.finish()
    assert small.first.out_features == 6
    assert report.difference <= 1e-5
    assert any(
        "aux.weight trains, and forward() of Aux does not read it" in n for n in report.notes
    )


def test_a_layer_beside_forward_that_can_read_no_width_is_no_reason() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, Aux)
        return plain_loss(model, x, y) + model.aux(model.first(x).relu()).square().mean()

    shrinker = attached(Aux(inside=False), {"second": 6})
    trained(shrinker, loss)
    assert shrinker.is_shrunk


def test_a_layer_that_nothing_calls_is_no_reason() -> None:
    shrinker = attached(Aux(inside=False), {"first": 6})
    assert shrinker._parts.structure.unread == ("aux.weight", "aux.bias")
    trained(shrinker)
    assert shrinker.finish()[0].first.out_features == 6


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.left, self.right = (
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return self.left(h), self.right(h)


@pytest.mark.parametrize("algorithm", ["regrow", "ramp", "prox"])
def test_heads_that_train_in_turn_end_with_the_counts_asked_for(algorithm: str) -> None:
    turn = iter(range(10**6))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(model(x)[next(turn) % 2], y)

    shrinker = attached(TwoHeads(), {"left.0": 5, "right.0": 4}, algorithm=algorithm)
    trained(shrinker, loss)
    small, report = shrinker.finish()
    assert (small.left[0].out_features, small.right[0].out_features) == (5, 4)
    (note,) = [n for n in report.notes if "no look saw a gradient" in n]
    assert note.startswith("left.0")


@pytest.mark.parametrize("steps", [STEPS, 9])
@pytest.mark.parametrize("algorithm", ["regrow", "ramp", "prox"])
def test_a_model_that_no_look_finds_trained_ends_with_the_counts(
    algorithm: str, steps: int
) -> None:
    """Its steps and those of another model of the same optimizer take turns."""
    model, other = chain(), nn.Linear(6, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.05)
    turn = iter(range(10**6))

    def loss(own: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(own if next(turn) % 2 == 0 else other, x, y)

    shrinker = attached(model, {"0": 5}, optimizer=optimizer, algorithm=algorithm)
    trained(shrinker, loss, steps=steps)
    assert shrinker.finish()[0][0].out_features == 5


def test_units_without_gradients_go_by_their_size() -> None:
    model = TwoHeads()
    with torch.no_grad():
        model.left[0].weight[::2] *= 1e-3
        model.left[0].bias[::2] *= 1e-3

    def loss(own: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(own(x)[1], y)

    shrinker = attached(model, {"left.0": 6})
    trained(shrinker, loss)
    assert shrinker.kept()["left.0"].tolist() == [1, 3, 5, 7, 9, 11]


def test_features_that_nobody_scaled_are_cut_all_the_same() -> None:
    """float32 sums of large terms that cancel differ by more than 1e-5 of their result."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seconds = 1.7e9 + torch.rand(64) * 1e6
        x = torch.stack([seconds, torch.rand(64), torch.randn(64)], 1)
        model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))
    wanted = ((x - x.mean(0)) / x.std(0)).sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    shrinker = tersor.train.attach(
        model, optimizer, x, counts={"0": 32}, total_steps=400, schedule=Schedule(total_steps=400)
    )
    for _ in range(400):
        optimizer.zero_grad()
        functional.mse_loss(model(x), wanted).backward()
        optimizer.step()
    small, report = shrinker.finish()
    assert small[0].out_features == 32
    assert report.difference <= 1e-9
    assert any("in float64: rounding, not the cut" in n for n in report.notes)


def test_a_cut_that_changes_more_than_rounding_is_undone() -> None:
    shrinker = attached(chain(), {"0": 6})
    trained(shrinker, steps=23)
    model = shrinker.model
    # Not what attach saw: the second layer reads the first one's units in another order.
    model[2].register_forward_pre_hook(lambda _, x: (x[0].flip(1),))
    trained(shrinker, steps=1)
    _, report = shrinker.finish()
    assert report.difference > 1e-3
    assert any("was undone" in n for n in report.notes)
    assert model[0].out_features == 12


@pytest.mark.parametrize(
    ("keep", "held"),
    [(("0",), {"0"}), (("2",), {"2"}), (("0", "2"), {"0", "2"})],
)
def test_layers_in_keep_stay(keep: tuple[str, ...], held: set[str]) -> None:
    model = nn.Sequential(*chain(), nn.ReLU(), nn.Linear(3, 5), nn.Linear(5, 3))
    shrinker = attached(model, {"6": 2}, keep=keep)
    assert {h.name for h in shrinker._parts.structure.held if h.reason == "named in keep"} == held


class Depthwise(nn.Module):
    """A width that four layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.project = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.deep(self.expand(x))).relu()
        out: Tensor = self.head(self.project(x).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("name", ["expand", "deep", "norm"])
def test_any_layer_that_carries_a_width_keeps_it(name: str) -> None:
    shrinker = attached(Depthwise(), {"project": 2}, example=torch.randn(2, 3, 5, 5), keep=(name,))
    assert "expand" not in shrinker._parts.structure.groups


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "0"}, "keep: found '0', wanted a tuple"),
        ({"keep": None}, "keep: found None"),
        ({"keep": (3,)}, "keep: found 3 in it"),
        ({"counts": [3]}, r"counts: found \[3\]"),
        ({"target": 2}, r"target: found 2, wanted tersor.Target"),
        ({"rescue": 3}, "rescue: found 3, wanted a folder"),
        ({"schedule": 0.4}, "schedule: found 0.4"),
        ({"model": 3}, "model: found int"),
        ({"model": nn.LazyLinear(3)}, "a lazy layer"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(
    options: dict[str, object], words: str
) -> None:
    given: dict[str, object] = {
        "model": chain(), "target": None, "counts": None, "schedule": None, "rescue": None, "keep": ()
    }  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        check_kinds(**(given | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [3.5, True, 0, 13, "6"])
def test_counts_are_whole_numbers_within_a_width(count: object) -> None:
    structure = find_structure(chain(), torch.randn(2, 6))
    assert checked_counts({"0": torch.tensor(6)}, structure) == {"0": 6}
    with pytest.raises(ConfigError, match="wanted 1 to 12 units"):
        checked_counts({"0": count}, structure)


def test_names_of_nothing_in_keep_are_refused() -> None:
    with pytest.raises(ConfigError, match="'body' is neither a layer nor a width"):
        attached(chain(), {"0": 6}, keep=("body",))


def test_models_and_optimizers_that_cannot_be_served_are_refused() -> None:
    model = chain()
    with pytest.raises(ConfigError, match="found LBFGS"):
        attached(model, {"0": 6}, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match=re.escape("keep=('0', '2')")):
        attached(model, {"0": 6}, optimizer=torch.optim.SGD(model[4].parameters(), 0.1))


def test_a_layer_of_the_same_shape_in_anothers_place_is_noticed() -> None:
    shrinker = attached(chain(), {"0": 6})
    trained(shrinker, steps=2)
    shrinker.model[0] = nn.Linear(6, 12)
    with pytest.raises(ConfigError, match="its layer replaced"):
        trained(shrinker)


def test_an_early_end_says_how_many_steps_were_made() -> None:
    shrinker = attached(chain(), {"0": 6})
    with pytest.raises(ConfigError, match="no look at the scores"):
        shrinker.finish()
    trained(shrinker, steps=9)
    _, report = shrinker.finish()
    assert (report.steps, report.shrunk_at) == (9, 9)
    assert len([n for n in report.notes if "finish() was called after 9 steps" in n]) == 1


def test_weights_that_are_no_numbers_end_no_run() -> None:
    shrinker = attached(chain(), {"0": 6})
    trained(shrinker, steps=22)
    with torch.no_grad():
        shrinker.model[4].weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=re.escape("4.weight: its weights are not finite")):
        shrinker.finish()


def test_outputs_that_are_no_numbers_are_told_from_a_cut_that_failed() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    shrinker = attached(model, {"0": 6})
    trained(shrinker, steps=22)
    model[1].running_var.fill_(float("inf"))
    model[1].running_mean.fill_(float("inf"))
    _, report = shrinker.finish()
    assert any("in evaluation mode the outputs are not finite" in n for n in report.notes)


def test_states_that_were_cut_already_stay_when_a_run_goes_on() -> None:
    """The optimizer's states may be loaded before the structure."""
    model = chain()
    shrinker = attached(model, {"0": 6}, optimizer=torch.optim.AdamW(model.parameters(), 0.01))
    trained(shrinker, steps=40)
    states = (
        shrinker._parts.optimizer.state_dict(),
        shrinker.state_dict(),
        copy.deepcopy(model.state_dict()),
    )
    states = copy.deepcopy(states)
    other = chain()
    optimizer = torch.optim.AdamW(other.parameters(), 0.01)
    again = attached(other, {"0": 6}, optimizer=optimizer)
    optimizer.load_state_dict(states[0])
    again.load_state_dict(states[1])
    other.load_state_dict(states[2])
    assert all(
        optimizer.state[p]["exp_avg"].shape == p.shape and bool(optimizer.state[p]["exp_avg"].any())
        for p in other.parameters()
    )
    trained(shrinker, steps=20)
    trained(again, steps=20)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
