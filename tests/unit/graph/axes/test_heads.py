"""Which dimensions of heads may be mixed, and that mixing them changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import turns_freely
from tersor.graph.axes.heads import Heads, heads_of, turned, turned_tensor
from tests.unit.attending import Attention
from tests.unit.capturing import graph_of, random, scale_error, trained

X = random(3, 5, 10, seed=1)


def found_in(model: Attention) -> tuple[Axes, dict[str, Heads]]:
    axes = analyse_axes(graph_of(trained(model), X))
    found = {width.name: heads_of(axes, width) for width in axes.widths}
    return axes, {heads.kind: heads for heads in found.values() if heads is not None}


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (Attention(), {"values", "scores"}),
        (Attention(sharing=2), {"values", "scores"}),
        (Attention(sharing=4), {"values", "scores"}),
        (Attention(how="products"), {"values", "scores"}),
        (Attention(how="fused"), set()),  # its dimensions are no widths
        (Attention(between="rotary"), {"values"}),
        (Attention(between="relu"), {"scores"}),
        (Attention(between="norm"), {"scores"}),
        (Attention(heads=1), {"values", "scores"}),
    ],
)
def test_only_what_nothing_tells_apart_is_mixed(model: Attention, kinds: set[str]) -> None:
    axes, found = found_in(model)
    assert found.keys() == kinds
    for kind, heads in found.items():
        assert heads.sharing == model.sharing
        assert {len(rows) for _, rows in heads.places.values()} == {
            model.heads, model.heads // model.sharing
        }  # fmt: skip
        assert all(rows.shape[1] == model.size for _, rows in heads.places.values())
        assert turns_freely(axes.graph, heads), kind


def test_layers_without_attention_are_left_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Linear(8, 4))
    axes = analyse_axes(graph_of(trained(net), X))
    assert axes.widths
    assert all(heads_of(axes, width) is None for width in axes.widths)


def test_a_wrong_place_is_noticed() -> None:
    """The comparison can fail: heads in another order are other heads."""
    axes, found = found_in(Attention(sharing=2))
    heads = found["values"]
    places = dict(heads.places)
    name = next(n for n, (dim, _) in places.items() if dim == 1)
    places[name] = 1, places[name][1].flip(0)
    assert turns_freely(axes.graph, heads)
    assert not turns_freely(axes.graph, replace(heads, places=places))


def test_maps_of_both_projections_cancel() -> None:
    """Queries by F and keys by the inverse of its transpose: the scores are what they were."""
    axes, found = found_in(Attention())
    heads = found["scores"]
    maps = random(4, 6, 6, seed=7).double() + 2 * torch.eye(6)
    others = torch.linalg.inv(maps).mT
    turn = dict.fromkeys(heads.tensors_of(axes.graph, "first"), maps)
    both = turn | dict.fromkeys(heads.tensors_of(axes.graph, "second"), others)
    (wanted,) = axes.graph.run([X])
    assert scale_error(turned(axes.graph, heads.places, both).run([X])[0], wanted) < 1e-5
    assert scale_error(turned(axes.graph, heads.places, turn).run([X])[0], wanted) > 1e-3
    assert scale_error(axes.graph.run([X])[0], wanted) == 0  # not changed


@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_is_multiplied_head_by_head(dim: int) -> None:
    tensor, maps = random(8, 8, seed=2), random(3, 2, 2, seed=3)
    rows = torch.tensor([[0, 3], [5, 1], [7, 6]])
    wanted = tensor.clone().double()
    lines = wanted if dim == 0 else wanted.T
    before: Tensor = lines.clone()
    for h in range(3):
        for r in range(2):
            lines[rows[h, r]] = sum(maps[h, r, d].double() * before[rows[h, d]] for d in range(2))
    found = turned_tensor(tensor, (dim, rows), maps)
    assert found.dtype == tensor.dtype
    torch.testing.assert_close(found.double(), wanted)
    untouched = [2, 4]
    assert torch.equal(found.movedim(dim, 0)[untouched], tensor.movedim(dim, 0)[untouched])
