"""Models that mix the samples of a batch are refused by name; sound ones never are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.capture.mixing import check_mixing
from tersor.capture.module import PARITY, capture
from tersor.core.errors import ParityError
from tersor.core.records import TensorSpec
from tests.unit.capturing import random, samples, trained

X, SENTENCES, IMAGES = random(6, 4), random(6, 5, 8), random(6, 3, 6, 6)


class Layered(nn.Module):
    """A function of a layer and the input."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


def linear(function: Callable[[nn.Module, Tensor], Any]) -> nn.Module:
    return trained(Layered(nn.Linear(4, 3), function))


def batch_norm(kind: type[nn.Module], layer: nn.Module, width: int) -> nn.Module:
    return trained(nn.Sequential(layer, kind(width, track_running_stats=False)))


MIXED: dict[str, tuple[nn.Module, Tensor]] = {
    "mean": (linear(lambda f, x: f(x - x.mean(0))), X),
    "no variance among copies": (linear(lambda f, x: f((x - x.mean(0)) / x.std(0))), X),
    "softmax": (linear(lambda f, x: f(x).softmax(0)), X),
    "second output": (linear(lambda f, x: (f(x), x - x.sum(0))), X),
    "batch norm": (batch_norm(nn.BatchNorm1d, nn.Linear(4, 3), 3), X),
    "batch norm of images": (batch_norm(nn.BatchNorm2d, nn.Conv2d(3, 4, 3), 4), IMAGES),
    # The layers take sequences first, where nothing else is said.
    "attention": (trained(nn.TransformerEncoderLayer(8, 2, 16)), SENTENCES),
    "recurrence": (trained(Layered(nn.GRU(8, 4), lambda f, x: f(x)[0])), SENTENCES),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_samples_is_refused(name: str) -> None:
    module, x = MIXED[name]
    with pytest.raises(
        ParityError, match=r"mixes the samples of a batch.*one sample .*itself alone"
    ):
        capture(module, samples(x))


@pytest.mark.parametrize("name", MIXED)
def test_it_may_mix_where_it_is_looked_at_for_training(name: str) -> None:
    module, x = MIXED[name]
    capture(module, samples(x), fold=False)
    capture(module, samples(x), may_mix=True)


def test_what_changes_is_said() -> None:
    with pytest.raises(ParityError, match=r"output 'output_1' .*with the other samples in its"):
        capture(MIXED["second output"][0], samples(X))
    with pytest.raises(ParityError, match=r"output 'output' .*with the number of samples in its"):
        capture(linear(lambda f, x: f(x) / x.shape[0]), samples(X))
    place = linear(lambda f, x: f(x) + 9.0 * torch.arange(x.shape[0]).unsqueeze(1))
    with pytest.raises(ParityError, match=r"output 'output' .*with its place among the samples"):
        capture(place, samples(X))


@pytest.mark.parametrize("count", [1, 6])
def test_a_batch_norm_without_statistics_is_named(count: int) -> None:
    """One sample is repeated: its copies tell nothing, but alone it can't be computed."""
    with pytest.raises(
        ParityError, match=r"running statistics: '1' \(BatchNorm1d\)\).*alone can't"
    ):
        capture(MIXED["batch norm"][0], samples(X[:count]))


class Tokens(nn.Module):
    """A mean over what a mask leaves of a padded sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bag = nn.Embedding(9, 4, padding_idx=0), nn.EmbeddingBag(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        y, _ = self.attention(x, x, x, key_padding_mask=~mask)
        mean = (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return mean + self.bag(ids)


def padded() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([5, 1, 3, 2])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    return torch.arange(1, 21).reshape(4, 5) % 9 * mask, mask


def rounded(x: Tensor) -> Tensor:
    return torch.round(x * 4) / 4


class Codes(nn.Module):
    """Rounds to few codes between layers: another order of a sum may give another code."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = rounded(layer(x).tanh())
        return x


SOUND: dict[str, tuple[nn.Module, Any]] = {
    "images": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), IMAGES),
    "norms of a sample": (nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)), IMAGES),
    # Such a group has no variance, and torch refuses one of them with a batch norm's words.
    "groups of one value": (nn.Sequential(nn.Flatten(), nn.GroupNorm(4, 4)), X),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SENTENCES),
    "recurrence": (nn.LSTM(8, 4, batch_first=True), SENTENCES),
    "padded": (Tokens(), padded()),
    "codes": (Codes(), random(4, 64)),
    "half": (nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 3)).bfloat16(), X),
    "large sums": (nn.Sequential(nn.Linear(4096, 16), nn.Linear(16, 2)), random(3, 4096) + 100),
    "no dimension where one is left": (
        Layered(nn.Linear(4, 1), lambda f, x: f(x).squeeze() * 2), X,
    ),
    "whole numbers": (Layered(nn.Linear(4, 3), lambda f, x: (f(x), f(x).argmax(1))), X),
    "rows beside one number": (Layered(nn.Linear(4, 3), lambda f, x: (f(x), x.mean())), X),
    "equal samples": (nn.Linear(4, 3), X[:1].repeat(4, 1)),
    "one sample": (Layered(nn.Linear(4, 3), lambda f, x: f(x)), X[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_is_taken(name: str) -> None:
    module, item = SOUND[name]
    capture(trained(module), samples(item))


SPECS = [TensorSpec(name="y", dtype="float32", shape=(None, 3))]


def test_a_model_that_takes_no_batch_of_one_is_judged_by_larger_ones() -> None:
    layer, calls = trained(nn.Linear(4, 3)), []

    def run(flat: Any) -> list[Tensor]:
        calls.append(len(flat[0]))
        if len(flat[0]) == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        with torch.no_grad():
            return [layer(flat[0])]

    check_mixing(layer, run, [(X,)], SPECS, PARITY)
    assert calls == [1, 2, 2, 2]


def test_a_code_that_rounding_moves_is_no_mixing() -> None:
    """Other kernels compute a sample alone, or at another place: a step of an eighth of the scale."""

    def run(flat: Any) -> list[Tensor]:
        rows = flat[0].clone()
        rows[0, 0] += 0.125 * float(X.abs().max()) / (1 + len(rows))
        return [rows]

    check_mixing(nn.Identity(), run, [(X,)], SPECS, PARITY)


def test_samples_are_compared_that_differ() -> None:
    """The first rows are alike, and so are all of the largest shape: the pair is of another one."""
    shapes = [(torch.ones(3, 5),), (torch.cat([torch.zeros(2, 4), X]),)]
    module = linear(lambda f, x: f(x - x.mean(0)))
    seen: list[Tensor] = []

    def run(flat: Any) -> list[Tensor]:
        seen.append(flat[0])
        with torch.no_grad():
            return [module(flat[0])]

    with pytest.raises(ParityError, match="output 'y'"):
        check_mixing(module, run, shapes, SPECS, PARITY)
    alone, pair, *twins = seen
    assert torch.equal(pair, torch.stack([torch.zeros(4), X[0]]))
    assert torch.equal(alone, pair[1:])
    assert all(torch.equal(t, pair[[i, i]]) for i, t in enumerate(twins))


def test_outputs_that_are_not_finite_are_equal_to_themselves() -> None:
    """A sample beyond those of the comparison with the export may have infinite scores or NaN."""

    def run(flat: Any) -> list[Tensor]:
        return [torch.cat([flat[0].log(), flat[0]], 1)]

    group = (torch.tensor([[-1.0], [0.0]]),)
    check_mixing(nn.Identity(), run, [group], SPECS, PARITY)

    def mixed(flat: Any) -> list[Tensor]:
        return [F.relu(flat[0]) / flat[0].std(0, correction=0)]  # NaN beside a copy only

    with pytest.raises(ParityError, match="changes by inf"):
        check_mixing(nn.Identity(), mixed, [(torch.tensor([[1.0], [2.0]]),)], SPECS, PARITY)
