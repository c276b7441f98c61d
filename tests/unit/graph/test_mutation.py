"""In-place ops in graphs that are written by hand: the export itself never reads a stale name."""

import pytest
import torch
from torch import fx

from tersor.graph.mutation import has_mutation, is_mutating, remove_mutation, written_to

aten = torch.ops.aten


def graph(*, view_before: bool = False, view_of_base: bool = False) -> fx.Graph:
    """y = 3 x; z = y + 1; y.relu_(); return y - z, where y is read by its old name."""
    made = fx.Graph()
    x = made.placeholder("x")
    y = made.call_function(aten.mul.Tensor, (x, 3))
    z = made.call_function(aten.add.Tensor, (y, 1))
    view = made.call_function(aten.view.default, (y, [-1])) if view_before else None
    target = made.call_function(aten.view.default, (y, [-1])) if view_of_base else y
    made.call_function(aten.relu_.default, (target,))
    difference = made.call_function(aten.sub.Tensor, (y, z))
    made.output((difference, view) if view is not None else (difference,))
    return made


def run(made: fx.Graph) -> list[torch.Tensor]:
    module = fx.GraphModule({}, made)
    return list(module(torch.tensor([-1.0, 2.0])))


def test_readers_after_the_write_see_it_and_those_before_do_not() -> None:
    made = graph()
    before = run(made)
    assert before[0].tolist() == [2.0, -1.0]
    remove_mutation(made)
    assert not has_mutation(made)
    assert run(made)[0].tolist() == before[0].tolist()
    assert [str(n.target) for n in made.nodes if "relu" in str(n.target)] == ["aten.relu.default"]


@pytest.mark.parametrize("kind", ["view_before", "view_of_base"])
def test_writes_that_another_name_shows_stay(kind: str) -> None:
    made = graph(**{kind: True})
    before = [t.tolist() for t in run(made)]
    remove_mutation(made)
    assert has_mutation(made)
    assert [t.tolist() for t in run(made)] == before
    written = {n.target for n in written_to(made)}
    assert written == {aten.mul.Tensor, aten.view.default, aten.relu_.default}


def test_a_write_that_would_change_the_type_stays() -> None:
    made = fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    x.meta["val"], y.meta["val"] = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    made.output((made.call_function(aten.add_.Tensor, (x, y)),))
    remove_mutation(made)
    assert has_mutation(made)  # aten.add would give float64


def test_what_writes() -> None:
    made = fx.Graph()
    x = made.placeholder("x")
    cases = {
        aten.relu_.default: True,
        aten.relu.default: False,
        aten.copy_.default: True,
        aten.view.default: False,
        len: False,
    }
    for target, writes in cases.items():
        args = (
            (x, x)
            if target is aten.copy_.default
            else (x, [2])
            if target is aten.view.default
            else (x,)
        )
        assert is_mutating(made.call_function(target, args)) == writes
    assert not is_mutating(x)
