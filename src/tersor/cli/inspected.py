"""An inspection for people: the tree, the widths and the pinned dimensions, alike ones folded.

Thirty equal layers are one branch, one line for each of their widths, and one for what pins them:
numbers in names become ``*``. ``--json`` has everything one by one.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.analyse.inspection import Branch, Inspection, PinnedInfo, WidthInfo
from tersor.core.units import format_bytes

NAMES = 4  # of coupled or pinned tensors in one cell
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.:#])")  # a whole part of a path
ItemT = TypeVar("ItemT")


def render_inspection(found: Inspection) -> RenderableType:
    """All of it, the tree first and the totals last."""
    parts: list[RenderableType] = []
    if found.tree is not None:
        parts.append(tree_table(found.tree))
    parts += [widths_table(found.widths), pinned_table(found.pinned), Text(summary(found))]
    return Group(*parts)


def tree_table(tree: Branch) -> Table:
    """Modules as branches, sites and ops as leaves; equal neighbours once."""
    timed = tree.time_percent is not None
    columns = ["model", "kind", "weight", "MACs per sample", "size"]
    columns += [*(["time"] if timed else []), "widths"]
    table = _table("tree", columns, {"MACs per sample", "size", "time"})
    for row in tree_rows(tree):
        branch = row.branch
        cells = [row.label, branch.kind, "x".join(map(str, branch.shape))]
        cells += [f"{branch.macs:,}", format_bytes(float(branch.size_bytes))]
        if timed:
            cells.append(f"{branch.time_percent:.1f} %")
        table.add_row(*(Text(cell) for cell in [*cells, _widths(branch)]))
    return table


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One line of the tree: the branch, or the mean of equal ones, and its name with guides."""

    label: str
    branch: Branch


def tree_rows(tree: Branch) -> list[TreeRow]:
    """The tree line by line; neighbours with equal numbers below equal names are one."""
    return [TreeRow(tree.name or "(model)", tree), *_rows_below(tree, "")]


def _rows_below(branch: Branch, indent: str) -> list[TreeRow]:
    groups = [list(alike) for _, alike in groupby(branch.children, _shape)]
    rows = []
    for number, alike in enumerate(groups):
        last = number == len(groups) - 1
        one = alike[0] if len(alike) == 1 else _mean(alike)
        name = one.name
        if len(alike) > 1:
            name = f"{alike[0].name} ... {alike[-1].name} ({len(alike)} alike, each:)"
        rows.append(TreeRow(f"{indent}{'`- ' if last else '|- '}{name}", one))
        rows += _rows_below(one, indent + ("   " if last else "|  "))
    return rows


def _shape(branch: Branch) -> Hashable:
    """What must be equal in branches that are shown as one; their own names may differ."""
    below = tuple((child.name, _shape(child)) for child in branch.children)
    # Two layers side by side with nothing below are told apart by name: they do different work.
    own = "" if below else branch.name
    return (own, branch.kind, branch.shape, branch.size_bytes, branch.macs, branch.pinned, below)


def _mean(alike: Sequence[Branch]) -> Branch:
    """The first of equal branches, with the mean of their times all the way down."""
    first = alike[0]
    times = [b.time_percent for b in alike if b.time_percent is not None]
    return replace(
        first,
        time_percent=sum(times) / len(times) if times else None,
        makes=tuple(pattern(name) for name in first.makes),
        reads=tuple(pattern(name) for name in first.reads),
        children=tuple(_mean(children) for children in zip(*(b.children for b in alike), strict=True)),
    )


def _widths(branch: Branch) -> str:
    parts = [f"makes {', '.join(branch.makes)}"] if branch.makes else []
    parts += [f"reads {', '.join(branch.reads)}"] if branch.reads else []
    parts += [f"format pinned: {branch.pinned}"] if branch.pinned else []
    return "; ".join(parts)


def widths_table(widths: Iterable[WidthInfo]) -> Table:
    """What may be made narrower; equal widths of equal layers are one line."""
    columns = ["width", "count", "kind", "exactness", "units", "size", "MACs per sample", "coupled"]
    table = _table("widths", columns, {"count", "units", "size", "MACs per sample"})
    for alike in _alike(widths, _width_key):
        width = alike[0]
        several = len(alike) > 1
        names = [f"{c.tensor}[{c.dim}]" for c in width.coupled]
        cells = [
            pattern(width.name) if several else width.name,
            str(len(alike)),
            width.kind,
            width.exactness if width.pinned is None else f"{width.exactness}, {width.pinned}",
            str(width.units),
            format_bytes(float(width.size_bytes)),
            f"{width.macs:,}",
            few(map(pattern, names) if several else names),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _width_key(width: WidthInfo) -> Hashable:
    numbers = (width.units, width.size_bytes, width.macs, len(width.coupled))
    return (pattern(width.name), width.kind, width.exactness, width.pinned, *numbers)


def pinned_table(pinned: Iterable[PinnedInfo]) -> Table:
    """What holds dimensions whole, the rarest reason first: kernels come last."""
    columns = ["pinned by", "reason", "dimensions", "sizes", "where"]
    table = _table("pinned dimensions", columns, {"dimensions"})
    groups = _alike(pinned, lambda p: (p.op, p.reason))
    for alike in sorted(groups, key=len):
        names = [f"{pattern(p.tensor)}[{p.dim}]" for p in alike]
        sizes = sorted({p.size for p in alike})
        cells = [alike[0].op, alike[0].reason, str(len(alike)), few(map(str, sizes)), few(names)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def summary(found: Inspection) -> str:
    """Totals in a line, then what no site covers and what no rule knows."""
    size = format_bytes(float(found.size_bytes))
    lines = [
        f"{found.nodes} nodes, {found.macs:,} MACs per sample at the sites, {size}",
        f"{len(found.widths)} widths; exact ones reach {100 * found.mac_share:.1f} % of all MACs; "
        f"{len(found.pinned)} dimensions pinned; analysed in {found.seconds:.2f} s",
    ]
    if found.pass_ms is not None:
        lines.append(f"one pass of one sample, op by op in torch: {found.pass_ms:.2f} ms")
    lines += [f"no rule for {op}: met {n} times, pins" for op, n in sorted(found.unknown.items())]
    lines += [f"not a site: {name}: {why}" for name, why in found.unsupported.items()]
    return "\n".join(lines)


def pattern(name: str) -> str:
    """A name with ``*`` for numbers of layers."""
    return _NUMBER.sub("*", name)


def few(names: Iterable[str]) -> str:
    """The first different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = len(different) - NAMES
    shown = ", ".join(different[:NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def _alike(
    items: Iterable[ItemT], key: Callable[[ItemT], Hashable]
) -> list[list[ItemT]]:  # in the order of each group's first
    groups: dict[Hashable, list[ItemT]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _table(title: str, columns: Sequence[str], numeric: set[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    return table
