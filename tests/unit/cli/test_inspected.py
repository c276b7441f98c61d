"""An inspection in the terminal: what is folded, what is not, and what the command hands over."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from tersor.analyse.inspection import Branch, Coupled, Inspection, PinnedInfo, WidthInfo
from tersor.cli.inspected import (
    alike,
    few,
    pattern,
    pinned_table,
    places,
    render_inspection,
    summary,
    tree_rows,
    tree_table,
    widths_table,
)
from tersor.cli.main import app
from tersor.core.jsonable import from_json
from tersor.core.records import Signature, Structure

EMPTY = Structure(kind="tuple")
SIGNATURE = Signature(inputs=(), outputs=(), args=EMPTY, kwargs=EMPTY, result=EMPTY)
SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

inputs = [torch.zeros(1, 4)]
"""


def shown(item: RenderableType, width: int = 160) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False).print(item)
    return stream.getvalue()


def layer(index: int, *, macs: int = 10, time: float | None = None) -> Branch:
    path = f"layers.{index}"
    leaf = Branch(
        name="up",
        path=f"{path}.up",
        kind="linear",
        shape=(6, 4),
        macs=macs,
        size_bytes=96,
        time_percent=time,
        makes=(f"{path}.up",),
    )
    return Branch(
        name=str(index),
        path=path,
        kind="Layer",
        macs=macs,
        size_bytes=96,
        time_percent=time,
        children=(leaf,),
    )


def model(*layers: Branch, time: float | None = None) -> Branch:
    holder = Branch(name="layers", path="layers", kind="", time_percent=time, children=layers)
    return Branch(name="", path="", kind="Model", time_percent=time, children=(holder,))


def width(name: str, **changes: Any) -> WidthInfo:
    coupled = tuple(
        Coupled(tensor=f"{name}.{part}", dim=0, role="producer", per_unit=1)
        for part in ("weight", "bias")
    )
    found = WidthInfo(
        name=name,
        kind="neurons",
        exactness="exact",
        units=6,
        size_bytes=96,
        macs=10,
        coupled=coupled,
    )
    return replace(found, **changes)


def held(tensor: str, dim: int, op: str = "aten.conv2d", reason: str = "kernel") -> PinnedInfo:
    return PinnedInfo(tensor=tensor, dim=dim, size=3, op=op, node="n", reason=reason)


def labels(tree: Branch) -> list[str]:
    return [row.label for row in tree_rows(tree)]


def test_equal_neighbours_are_one_branch() -> None:
    assert labels(model(*map(layer, range(3)))) == [
        "(model)",
        "`- layers",
        "   `- 0 ... 2 (each of 3)",
        "      `- up",
    ]


def test_a_layer_that_differs_stands_alone() -> None:
    assert labels(model(layer(0), layer(1), layer(2, macs=11), layer(3)))[2:] == [
        "   |- 0 ... 1 (each of 2)",
        "   |  `- up",
        "   |- 2",
        "   |  `- up",
        "   `- 3",
        "      `- up",
    ]


def test_leaves_of_different_names_are_never_one() -> None:
    leaf = layer(0).children[0]
    both = replace(layer(0), children=(leaf, replace(leaf, name="gate", path="layers.0.gate")))
    assert labels(both) == ["0", "|- up", "`- gate"]


def test_equal_branches_show_their_mean_time() -> None:
    tree = model(layer(0, time=10.0), layer(1, time=30.0), time=40.0)
    times = [row.branch.time_percent for row in tree_rows(tree)]
    assert times == [40.0, 40.0, 20.0, 20.0]
    text = shown(tree_table(tree, {"layers.0.up": 1, "layers.1.up": 1}))
    assert "20.0 %" in text
    assert "time" not in shown(tree_table(model(layer(0)), {"layers.0.up": 1}))


def test_the_tree_names_widths_by_their_line() -> None:
    widths = (width("layers.0.up"), width("layers.1.up"), width("head"))
    found = Inspection(signature=SIGNATURE, sites=(), widths=widths, tree=model(layer(0), layer(1)))
    lines = shown(render_inspection(found)).splitlines()
    (up,) = [line for line in lines if "`- up" in line]
    assert up.rstrip("│ ").endswith("1")
    (alike_line,) = [line for line in lines if "layers.*.up " in line]
    assert [cell.strip() for cell in alike_line.split("│")[1:5]] == [
        "1", "layers.*.up", "2", "neurons",
    ]  # fmt: skip
    assert "layers.*.up.weight[0], layers.*.up.bias[0]" in alike_line
    (head,) = [line for line in lines if " head " in line]
    assert [cell.strip() for cell in head.split("│")[1:4]] == ["2", "head", "1"]


def test_equal_branches_show_the_widths_of_all() -> None:
    text = shown(tree_table(model(layer(0), layer(1)), {"layers.0.up": 4, "layers.1.up": 7}))
    assert "4, 7" in text


@pytest.mark.parametrize(
    "change",
    [
        {"units": 7},
        {"exactness": "approximate"},
        {"macs": 11},
        {"size_bytes": 97},
        {"pinned": "kept"},
        {"kind": "channels"},
    ],
)
def test_widths_that_differ_are_two_lines(change: dict[str, Any]) -> None:
    widths = (width("layers.0.up"), width("layers.1.up", **change))
    found = Inspection(signature=SIGNATURE, sites=(), widths=widths)
    assert "layers.*.up" not in shown(render_inspection(found))


def test_a_kept_width_says_so() -> None:
    assert "exact, kept: matches" in shown(widths_table([[width("a", pinned="kept: matches")]]))


def test_kernels_are_one_line_below_the_rest() -> None:
    kernels = [held(f"layers.{i}.conv.weight", d) for i in range(9) for d in (2, 3)]
    output = held("head.weight", 0, op="output", reason="an output of the model")
    lines = shown(pinned_table([*kernels, output])).splitlines()
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["output", "an output of the model", "1", "3", "head.weight[0]"],
        ["aten.conv2d", "kernel", "18", "3", "layers.*.conv.weight[2, 3]"],
    ]


def test_summary_names_ops_without_a_rule_and_groups_what_is_no_site() -> None:
    found = Inspection(
        signature=SIGNATURE,
        sites=(),
        unsupported={f"up_{i}": "no integer form" for i in range(6)},
        unknown={"aten.foo": 3},
        macs=1234,
        size_bytes=2_000_000,
        nodes=7,
        mac_share=0.625,
        seconds=0.5,
        pass_ms=4.0,
    )
    assert summary(found).splitlines() == [
        "7 nodes, 1,234 MACs per sample at the sites, 2.00 MB",
        "0 widths; exact ones reach 62.5 % of all MACs",
        "0 dimensions pinned; analysed in 0.50 s",
        "one pass of one sample, op by op in torch: 4.00 ms",
        "no rule for aten.foo: met 3 times, pins",
        "not a site: up_0, up_1, up_2, up_3 and 2 more: no integer form",
    ]


def test_names_are_never_read_as_markup() -> None:
    tree = replace(layer(0), name="a[bold]b")
    assert "a[bold]b" in shown(tree_table(tree, {"layers.0.up": 1}))
    assert "a[red]" in shown(pinned_table([held("w", 0, reason="a[red]")]))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layers.12.fc1.weight", "layers.*.fc1.weight"),
        ("0.weight", "*.weight"),
        ("blocks.3", "blocks.*"),
        ("h.2:heads", "h.*:heads"),
        ("fc.1#2", "fc.*#2"),
        ("down0.block1", "down0.block1"),
        ("a.0.1.b", "a.*.*.b"),
        ("layers.0.w[1]", "layers.*.w[1]"),
    ],
)
def test_patterns(name: str, wanted: str) -> None:
    assert pattern(name) == wanted


def test_small_words() -> None:
    assert few("aabbc") == "a, b, c"
    assert few("abcdef") == "a, b, c, d and 2 more"
    assert few(()) == ""
    assert places([("a", 0), ("b", 1), ("a", 2), ("a", 0)]) == ["a[0, 2]", "b[1]"]
    assert alike(range(5), lambda n: n % 2) == [[0, 2, 4], [1, 3]]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "layers.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


def test_the_command_shows_the_tree_with_times(source: str) -> None:
    words = ["inspect", f"{source}:Net", f"{source}:inputs", "--time", "--keep", "layers.2.*"]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "0 ... 1 (each of 2)" in ran.stdout
    assert "100.0 %" in ran.stdout
    assert "format pinned: layers.2.0: kept: matches 'layers.2.*'" in ran.stdout.splitlines()
    assert "op by op in torch" in ran.stdout


def test_the_command_gives_the_whole_record_as_json(source: str) -> None:
    words = ["inspect", f"{source}:Net", f"{source}:inputs", "--json"]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    found = from_json(Inspection, json.loads(ran.stdout))
    assert [w.name for w in found.widths] == ["layers.0.0", "layers.1.0"]
    assert found.tree is not None
    assert [b.name for b in found.tree.children[0].children] == ["0", "1", "2"]
    assert found.tree.time_percent is None
    assert "widths" in ran.stderr
