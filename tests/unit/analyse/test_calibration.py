"""Statistics of sites, and the self-check that must notice wrong ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse import calibration
from tersor.analyse.calibration import input_amax, self_check, site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.errors import NumericalError
from tersor.graph.operators import WeightedOp, as_rows, weighted_ops
from tersor.observe.statistics import observe
from tests.unit.capturing import graph_of, random, tensor_of, trained


class Readers(nn.Module):
    """Three readers of one tensor; two of them of another size, one of them padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.q, self.k = nn.Conv1d(4, 6, 1), nn.Conv1d(4, 4, 3, padding=1, groups=2, bias=False)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = x.tanh()
        return self.last(self.q(y)), self.k(y) + self.embed(i).mean()


FLAT = (random(300, 4, 5, seed=1), torch.arange(300) % 9)


def test_readers_of_one_tensor_share_what_a_quantiser_needs() -> None:
    module = trained(Readers())
    graph = graph_of(module, random(4, 4, 5), torch.arange(4))
    sites = find_sites(graph)
    observed = observe(graph, [FLAT], 1, seed=0)
    found = site_statistics(graph, sites, observed)
    q, k = found["q"], found["k"]
    for name in ("channels", "counts", "edges"):
        assert torch.equal(getattr(q, name), getattr(k, name))
    assert (q.low, q.high, q.is_padded) == (k.low, k.high, True)
    assert not found["last"].is_padded
    by_hand = torch.maximum(
        module.q.weight.abs().amax((0, 2)),
        torch.cat([g.abs().amax((0, 2)) for g in module.k.weight.chunk(2)]),
    )
    readers = tensor_readers(graph, sites)
    assert set(readers) == {"tanh", "conv1d"}
    assert torch.equal(readers["tanh"].amax, by_hand.detach())
    assert readers["tanh"].weight is None  # for linear readers only
    assert torch.equal(readers["conv1d"].weight, module.last.weight.detach())
    for one in (q.readers, k.readers):
        assert one is not None
        assert torch.equal(one.amax, readers["tanh"].amax)
    assert (q.channel_dim, found["last"].channel_dim) == (1, -1)
    assert k.weight.shape == (2, 2, 6)
    assert k.bias is None
    assert torch.equal(q.bias, module.q.bias.detach().double()[None])
    assert k.moments().count == q.moments().count == 1500
    assert k.rows().output.shape[1:] == (2, 2)


def test_an_embedding_has_a_table_only() -> None:
    module = trained(Readers())
    graph = graph_of(module, random(4, 4, 5), torch.arange(4))
    found = site_statistics(graph, find_sites(graph), observe(graph, [FLAT], 1, seed=0))["embed"]
    assert torch.equal(found.weight[0], module.embed.weight.detach().double())
    with pytest.raises(NumericalError, match="no input moments"):
        found.moments()
    with pytest.raises(NumericalError, match="no input rows"):
        found.rows()


def test_input_amax_of_a_depthwise_convolution() -> None:
    graph = graph_of(trained(nn.Sequential(nn.Conv2d(3, 6, 2, groups=3))), random(4, 3, 4, 4))
    (op,) = weighted_ops(graph.module)
    weight = tensor_of(graph, "0.weight")
    wanted = [float(weight[2 * c : 2 * c + 2].abs().max()) for c in range(3)]
    assert input_amax(weight, op).tolist() == wanted


def check(module: nn.Module, *flat: Tensor) -> float:
    notes: list[str] = []
    graph = graph_of(module, *flat)
    worst = self_check(graph, flat, seed=0, note=notes.append)
    assert notes == [f"self-check: predicted and run layer losses agree to {worst:.1e}"]
    return worst


def test_the_self_check_passes_on_real_networks(
    resnet20: nn.Module, lenet5: nn.Module, images: dict[str, Tensor]
) -> None:
    flat = images["train"][:8]
    assert check(resnet20, flat) < 1e-4
    assert check(lenet5, flat) < 1e-4


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda rows: rows * 1.01,
    "a row too few": lambda rows: rows[1:],
    "another order of inputs": lambda rows: rows.flip(2),
    "centred": lambda rows: rows - rows.mean(0),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_self_check_notices_wrong_statistics(
    name: str, lenet5: nn.Module, images: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(data: Tensor, op: WeightedOp, mask: Tensor | None = None) -> Tensor:
        rows = as_rows(data, op, mask)
        return WRONG[name](rows) if op.node.name == "linear" else rows

    monkeypatch.setattr(calibration, "as_rows", wrong)
    flat = images["train"][:8]
    graph = graph_of(lenet5, flat)
    with pytest.raises(
        NumericalError, match=r"linear: predicted layer loss .* wanted agreement to 0\.001"
    ):
        self_check(graph, (flat,), seed=0, note=lambda _: None)
