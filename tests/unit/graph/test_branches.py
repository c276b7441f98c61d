"""A replaced branch computes what the original does with the sum's value written over."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.branches import branch_sites
from tersor.analyse.sites import find_sites
from tersor.core.errors import ShapeError, SiteNotFoundError
from tersor.graph.axes import analyse_axes
from tersor.graph.branches import replace_branches, widths_after
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import parameters_by_name
from tersor.graph.residuals import find_branches
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tests.unit.branching import One, channels_last, encoder, made, overwritten, pictures
from tests.unit.capturing import graph_of, random, scale_error, targets, trained

# The same sums in another order, through at most ten layers of float32.
SAME = 1e-5
MATTERS = 1e-2  # of the output's scale: a change that could be lost would prove nothing

NETS: dict[str, Callable[[], Graph]] = {
    "pictures": pictures,
    "before": lambda: encoder(after=False),
    "after": lambda: encoder(after=True),
    "channels last": channels_last,
}


def changes(graph: Graph, level: int, *names: str) -> list[SiteChange]:
    """A random change of every branch, or of those named."""
    sites = {s.name: s for s in branch_sites(graph)}
    found = enumerate(find_branches(graph))
    wanted = {f"branch:{name}" for name in names} or sites.keys()
    return [made(b, sites[b.name], level, seed=i) for i, b in found if b.name in wanted]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_each_branch_alone(net: str, level: int) -> None:
    graph = NETS[net]()
    (original,) = graph.run(graph.example)
    for change in changes(graph, level):
        edited = replace_branches(graph, [change])
        (found,), (wanted,) = (
            edited.run(edited.example),
            overwritten(graph, {change.site.name: change}),
        )
        assert scale_error(found, wanted) < SAME, change.site.name
        assert scale_error(found, original) > MATTERS, change.site.name
        assert not set(change.site.ops[:-1]) & {n.name for n in edited.module.graph.nodes}


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_all_branches_at_once_at_another_batch(net: str, level: int) -> None:
    graph = NETS[net]()
    every = changes(graph, level)
    inner = [c for c in every if not any(set(c.site.ops) < set(o.site.ops) for o in every)]
    wider = replace(graph, example=tuple(torch.cat([t, 2 * t[:3]]) for t in graph.example))
    edited = replace_branches(graph, every)
    (found,) = edited.run(wider.example)
    assert found.shape[0] == len(wider.example[0])
    (wanted,) = overwritten(wider, {c.site.name: c for c in inner})
    assert scale_error(found, wanted) < SAME


@pytest.mark.parametrize("net", NETS)
def test_the_original_stays_and_tensors_are_shared(net: str) -> None:
    graph = NETS[net]()
    before, code = graph.run(graph.example), graph.module.code
    tensors = {name: t.clone() for name, t in parameters_by_name(graph.module).items()}
    for level in (0, 1):
        edited = replace_branches(graph, changes(graph, level))
        shared = parameters_by_name(edited.module)
        assert any(t.data_ptr() == shared[n].data_ptr()
                   for n, t in parameters_by_name(graph.module).items() if n in shared)  # fmt: skip
    assert graph.module.code == code
    assert all(torch.equal(t, tensors[n]) for n, t in parameters_by_name(graph.module).items())
    assert torch.equal(graph.run(graph.example)[0], before[0])


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_members_are_gone_and_the_rest_of_the_stages_go_on(net: str, level: int) -> None:
    graph = NETS[net]()
    sites = branch_sites(graph)
    edited = replace_branches(graph, changes(graph, level))
    left = graph_tensors(edited)
    gone = {name for site in sites for name in site.members} - left.keys()
    if level == 0:
        assert gone == {name for site in sites for name in site.members}
    assert edited.parameter_bytes() < graph.parameter_bytes()
    again = graph_from_json(json.loads(json.dumps(graph_to_json(edited))), left)
    assert torch.equal(again.run(edited.example)[0], edited.run(edited.example)[0])
    assert all("val" in n.meta for n in edited.module.graph.nodes if n.op == "call_function")
    names = {site.name for site in find_sites(edited)}
    assert names <= {site.name for site in find_sites(graph)}  # formats go by the names of before


@pytest.mark.parametrize("level", [0, 1])
def test_widths_are_found_again(level: int) -> None:
    graph = pictures()
    chosen = changes(graph, level, "blocks.0", "blocks.1")
    before, after = analyse_axes(graph), analyse_axes(replace_branches(graph, chosen))
    # The stream behind the second block was named by a convolution that is gone.
    assert widths_after(before, after, chosen) == {
        "stem": "stem",
        "blocks.1.b": "blocks.1.short",
        "blocks.2.a": "blocks.2.a",
        "blocks.2.b": "blocks.2.b",
    }
    assert {w.name for w in after.widths} == set(widths_after(before, after, chosen).values())


def test_a_map_under_the_name_of_an_op_is_no_trace_of_its_widths() -> None:
    graph = encoder(after=False)
    chosen = changes(graph, 1, "layers.0.mix")
    before, after = analyse_axes(graph), analyse_axes(replace_branches(graph, chosen))
    found = widths_after(before, after, chosen)
    assert "layers.0.mix.0" in {w.name for w in before.widths}
    assert "layers.0.mix.0" not in found
    assert all(before[old].units == after[new].units for old, new in found.items())
    assert "layers.0.up" in found


def shape_of(graph: Graph, name: str) -> tuple[int, ...]:
    return tuple(parameters_by_name(graph.module)[name].shape)


def test_a_map_takes_the_place_and_the_names_of_the_last_op() -> None:
    graph = encoder(after=False)
    edited = replace_branches(graph, changes(graph, 1, "layers.0.up"))
    assert shape_of(edited, "layers.0.down.weight") == (6, 6)
    (site,) = [s for s in find_sites(edited) if s.name == "layers.0.down"]
    (before,) = [s for s in find_sites(graph) if s.name == "layers.0.down"]
    assert site.ops == before.ops
    assert site.macs == before.macs // 4
    picture = pictures()
    edited = replace_branches(picture, changes(picture, 1, "blocks.0"))
    assert shape_of(edited, "blocks.0.b.weight") == (4, 4, 1, 1)


def test_a_projection_takes_up_a_map_at_no_cost() -> None:
    graph = pictures()
    edited = replace_branches(graph, changes(graph, 1, "blocks.1", "blocks.2"))
    assert len(targets(edited)) == len(targets(graph)) - 2 * 4
    assert shape_of(edited, "blocks.1.short.weight") == (6, 4, 1, 1)
    assert shape_of(edited, "blocks.1.short.bias") == (6,)  # it had none
    assert shape_of(edited, "blocks.2.short.weight") == (5, 6, 3, 3)


@pytest.mark.parametrize(
    ("net", "name", "sums"),
    [
        ("pictures", "blocks.0", 1),  # the stem's bias
        ("pictures", "blocks.1", 1),  # the shortcut's
        ("before", "layers.0.mix", 1),  # that of the map in front
        ("before", "layers.0.up", 1),  # that of the mixture's last map, through the sum before
        ("after", "layers.0.up", 1),  # that of the norm before
        ("before", "layers.0", 2),
        ("channels last", "", 1),
    ],
)
def test_a_mean_goes_to_a_bias_that_nothing_else_sees(net: str, name: str, sums: int) -> None:
    graph = NETS[net]()
    edited = replace_branches(graph, changes(graph, 0, *([name] if name else [])))
    add = "aten.add.Tensor"
    assert targets(edited).count(add) == targets(graph).count(add) - sums
    assert graph_tensors(edited).keys() - graph_tensors(graph).keys() <= {"blocks.1.short.bias"}


def test_a_mean_that_no_bias_can_take_is_a_stored_vector() -> None:
    class Net(nn.Module):
        def __init__(self, *, reader: bool) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 9, 1), nn.Conv1d(9, 4, 1)
            self.reader = reader

        def forward(self, x: Tensor) -> object:
            x = self.stem(x)
            s = x if self.reader else x.relu()
            y = s + self.b(self.a(s).tanh())
            return (y, s.exp()) if self.reader else y

    for reader in (False, True):
        graph = graph_of(trained(Net(reader=reader)), random(3, 2, 7))
        (change,) = changes(graph, 0)
        edited = replace_branches(graph, [change])
        for found, wanted in zip(
            edited.run(edited.example), overwritten(graph, {change.site.name: change}), strict=True
        ):
            assert scale_error(found, wanted) < SAME
        assert shape_of(edited, "add_mean") == (4, 1)
        assert targets(edited).count("aten.add.Tensor") == 1
        bias = parameters_by_name(graph.module)["stem.bias"]
        assert torch.equal(parameters_by_name(edited.module)["stem.bias"], bias)


def test_a_bias_along_another_dimension_takes_no_mean() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.a, self.b = nn.Conv1d(4, 9, 1), nn.Conv1d(9, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return (x + self.b(self.a(x).tanh())).exp()

    graph = graph_of(trained(Net()), random(3, 4, 4))
    (change,) = changes(graph, 0)
    edited = replace_branches(graph, [change])
    (found,) = edited.run(edited.example)
    assert scale_error(found, overwritten(graph, {change.site.name: change})[0]) < SAME
    assert shape_of(edited, "add_mean") == (4, 1)


def test_a_tensor_that_others_read_gets_no_new_value() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x + self.b(self.a(x).relu())
            return y, self.b(self.a(x.exp()))

    graph = graph_of(trained(Net()), random(3, 5, 4))
    (change,) = changes(graph, 1)
    assert change.site.members == ()
    edited = replace_branches(graph, [change])
    wanted = overwritten(graph, {change.site.name: change})
    for found, value in zip(edited.run(edited.example), wanted, strict=True):
        assert scale_error(found, value) < SAME
    assert shape_of(edited, "b.weight") == (4, 9)
    assert shape_of(edited, "b.weight_map") == (4, 4)


def test_the_outer_of_nested_branches_wins() -> None:
    graph = encoder(after=False)
    whole = changes(graph, 0, "layers.1")
    inner = changes(graph, 1, "layers.1.mix", "layers.1.up")
    found = replace_branches(graph, [*inner, *whole])
    (alone,) = replace_branches(graph, whole).run(graph.example)
    assert torch.equal(found.run(graph.example)[0], alone)


def test_kept_branches_and_other_sites_change_nothing() -> None:
    graph = pictures()
    kept = [SiteChange(site=s, level=2) for s in branch_sites(graph)]
    other = SiteChange(site=find_sites(graph)[0], level="int8")
    edited = replace_branches(graph, [*kept, other])
    assert edited.module.code == graph.module.code


def test_wrong_changes_are_refused() -> None:
    graph = encoder(after=True)
    (change,) = changes(graph, 1, "layers.0")
    unknown = replace(change, site=replace(change.site, name="branch:layers.7"))
    with pytest.raises(
        SiteNotFoundError, match=r"'branch:layers.7' is no branch.*branch:layers.0.mix"
    ):
        replace_branches(graph, [unknown])
    assert change.weight is not None
    wanted = r"layers.0 at level 1: found weight \(6, 5\), wanted \(6, 6\)"
    with pytest.raises(ShapeError, match=wanted):
        replace_branches(graph, [replace(change, weight=change.weight[:, :5])])
    with pytest.raises(ShapeError, match=r"level 0: found bias none, wanted \(6,\)"):
        replace_branches(graph, [replace(change, level=0, bias=None)])


def test_a_map_where_none_is_cheaper_is_refused() -> None:
    graph = graph_of(trained(One()), random(3, 4))
    with pytest.raises(ShapeError, match="branch:a: no linear map is cheaper; take level 0 or 2"):
        replace_branches(graph, changes(graph, 1))
