"""Norms that keep the statistics of the whole width, and what a cut does without them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.gate import EFFECT, TOLERANCE, check, random_share
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, run_all
from tests.unit.graph.axes.micro import Net

NAMES = ("weight", "bias")


def rows(width: int = 6, seed: int = 0) -> Graph:
    n = Net(seed)
    vectors = [n.param(f"n.{v}", width) for v in NAMES]
    return n.close(n.lin("b", n("layer_norm", n.lin("a", n.x(5, 4), width), [width], *vectors), 3))


def images(groups: int, each: int, *, affine: bool = True, seed: int = 0) -> Graph:
    n = Net(seed)
    vectors = [n.param(f"n.{v}", groups * each) for v in NAMES] if affine else []
    a = n.conv("a", n.x(3, 4, 4), groups * each)
    return n.close(n.conv("b", n("group_norm", a, groups, *vectors), 4))


def test_the_definition_with_zeros_in_the_place_of_units():
    graph = rows()
    keep = [0, 2, 3, 5]
    small = keep_units(graph, analyse_axes(graph), {"a": keep}, exact_norms=True)
    t = {n: attribute(graph.module, n) for n in ("a.weight", "a.bias", "n.weight", "n.bias")}
    (x,) = graph.example
    whole = functional.linear(x, t["a.weight"], t["a.bias"]).double()
    whole[..., [1, 4]] = 0
    mean, mean_square = whole.sum(-1, keepdim=True) / 6, (whole**2).sum(-1, keepdim=True) / 6
    y = (whole - mean) * (mean_square - mean**2 + 1e-5).rsqrt()
    wanted = (y * t["n.weight"] + t["n.bias"])[..., keep]
    env = run_all(small.module, [x])
    found = env["layer_norm_default"]
    assert found.shape == wanted.shape
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_the_other_form_is_one_op_of_what_is_left():
    graph = rows()
    axes = analyse_axes(graph)
    fused, exact = (
        keep_units(graph, axes, {"a": [0, 3]}, exact_norms=exact) for exact in (False, True)
    )
    names = [[n.name for n in g.module.graph.nodes if "norm" in n.name] for g in (fused, exact)]
    assert names[0] == ["layer_norm_default"]
    assert names[1] == [
        "layer_norm_default_input",
        "layer_norm_default_weight",
        "layer_norm_default_bias",
        "layer_norm_default_whole",
        "layer_norm_default",
    ]
    assert not check(graph, axes, {"a": [1, 2, 4, 5]}).difference <= EFFECT * TOLERANCE
    assert check(graph, axes, {"a": [1, 2, 4, 5]}, exact_norms=True).passed


def test_cutting_twice_is_cutting_once():
    graph = rows()
    once = keep_units(graph, analyse_axes(graph), {"a": [0, 5]}, exact_norms=True)
    half = keep_units(graph, analyse_axes(graph), {"a": [0, 2, 5]}, exact_norms=True)
    axes = analyse_axes(half)
    assert axes["a"].units == 3
    assert axes["a"].exactness == "approximate"
    twice = keep_units(half, axes, {"a": [0, 2]}, exact_norms=True)
    (x,) = graph.example
    assert torch.allclose(twice.run([x])[0], once.run([x])[0], atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.booleans(), st.integers(0, 2**16))
def test_groups_of_any_size(groups: int, each: int, affine: bool, seed: int):
    graph = images(groups, each, affine=affine, seed=seed)
    axes = analyse_axes(graph)
    gone = random_share(axes, 0.4, seed, exact_only=False)
    assert gone
    assert check(graph, axes, gone, exact_norms=True).difference <= TOLERANCE


@pytest.mark.parametrize("op", ["mean.dim", "rms_norm"])
def test_a_value_that_is_rescaled_has_the_name_of_the_original(op: str):
    """What is compared by name with the original must be what it was, up to the units."""
    n = Net()
    a = n.lin("a", n.x(5, 4), 6)
    y = n(op, a, [-1]) if op == "mean.dim" else n.lin("b", n(op, a, [6]), 3)
    graph = n.close(y)
    (x,) = graph.example
    for name in ("a.weight", "a.bias"):
        attribute(graph.module, name)[4:] = 0
    small = keep_units(graph, analyse_axes(graph), {"a": [0, 1, 2, 3]})
    name = op.replace(".", "_") if "." in op else f"{op}_default"
    before, after = run_all(graph.module, [x])[name], run_all(small.module, [x])[name]
    assert torch.allclose(before[..., :4] if before.dim() > 2 else before, after, atol=1e-6)
