"""Experts as units: renumbered, never fewer than a top-k takes, and barred only to the router."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import ShapeError
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.gate import TOLERANCE, check, random_share
from tersor.graph.axes.slicing import mask
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tests.unit.graph.axes.micro import Net

NAME = "a:experts"


def experts(count: int = 6, k: int = 2, *, softmax: bool = True, seed: int = 0) -> Graph:
    """Tokens that k of some linear maps see, weighted by their scores."""
    n = Net(seed)
    x = n.x()
    scores = n.lin("a", x, count, bias=False)
    values, places = n("topk", n("softmax.int", scores, -1) if softmax else scores, k, -1)
    maps = n("index.Tensor", n.param("w", count, 5, 4), [n("reshape", places, [-1])])
    tokens = n("unsqueeze", n("repeat_interleave.self_int", x, k, 0), -1)
    found = n("view", n("squeeze.dim", n("bmm", maps, tokens), -1), [-1, k, 5])
    y = n("sum.dim_IntList", n("mul.Tensor", found, n("unsqueeze", values, -1)), [1])
    return n.close(n.lin("b", y, 3))


def test_an_expert_takes_its_map_and_its_row_of_the_router():
    graph = experts()
    axes = analyse_axes(graph)
    assert {(c.tensor, c.dim) for c in axes[NAME].couplings} == {("a.weight", 0), ("w", 0)}
    small = keep_units(graph, axes, {NAME: [1, 2, 5]})
    for name in ("a.weight", "w"):
        assert torch.equal(attribute(small.module, name), attribute(graph.module, name)[[1, 2, 5]])
    assert analyse_axes(small)[NAME].units == 3


def test_what_is_left_is_what_a_router_of_the_kept_experts_computes():
    """The definition in plain loops."""
    graph = experts()
    keep = [0, 3, 4]
    small = keep_units(graph, analyse_axes(graph), {NAME: keep})
    W, V, B, c = (attribute(graph.module, n) for n in ("a.weight", "w", "b.weight", "b.bias"))
    (x,) = graph.example
    for row, found in zip(x.double(), small.run([x])[0], strict=True):
        share = torch.softmax(W[keep].double() @ row, 0)
        best = sorted(range(3), key=lambda i: -float(share[i]))[:2]
        y = sum(share[i] * (V[keep[i]].double() @ row) for i in best)
        assert torch.allclose(B.double() @ y + c.double(), found.double(), atol=1e-5)


@pytest.mark.parametrize("kept", [[], [4]])
def test_no_fewer_stay_than_the_top_k_takes(kept: list[int]):
    graph = experts()
    axes = analyse_axes(graph)
    assert axes[NAME].least == 2
    with pytest.raises(ShapeError, match="wanted 2 to 6 indices below 6; a top-k takes 2 of them"):
        keep_units(graph, axes, {NAME: kept})
    assert len(random_share(axes, 1.0, 0)[NAME]) == 4


def test_masked_experts_are_never_chosen():
    """Zero weights alone would leave them logits of zero, which may be the largest."""
    graph = experts(softmax=False)
    axes = analyse_axes(graph)
    masked = mask(graph, axes, axes.removed({NAME: [0, 1, 2, 3]}))
    scores = graph.example[0] @ attribute(masked.module, "a.weight").T
    gone = attribute(masked.module, "topk_default_gone")
    assert gone.tolist() == [True] * 4 + [False] * 2
    assert bool((scores.topk(2, -1).indices < 4).any())
    assert check(graph, axes, {NAME: [0, 1, 2, 3]}).passed


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_any_number_of_experts(count: int, k: int, softmax: bool, seed: int):
    graph = experts(count, min(k, count), softmax=softmax, seed=seed)
    axes = analyse_axes(graph)
    found = {w.name: (w.kind, w.units, w.least) for w in axes.widths}
    if k >= count:
        assert NAME not in found
        return
    assert found[NAME] == ("experts", count, k)
    assert check(graph, axes, random_share(axes, 0.6, seed)).difference <= TOLERANCE
