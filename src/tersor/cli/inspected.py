"""An inspection for people: the tree, the widths and the pinned dimensions, alike ones folded.

Thirty equal layers are one branch, one line for each of their widths, and one for what pins them:
numbers in names become ``*``. Branches name widths by their line in the table of widths, as names
of widths are long. ``--json`` has everything one by one.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeVar

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
    groups = alike(found.widths, _width_key)
    numbers = {w.name: number for number, group in enumerate(groups, 1) for w in group}
    parts: list[RenderableType] = []
    if found.tree is not None:
        parts.append(tree_table(found.tree, numbers))
    parts += [widths_table(groups), pinned_table(found.pinned), Text(summary(found))]
    return Group(*parts)


def tree_table(tree: Branch, numbers: Mapping[str, int]) -> Table:
    """Modules as branches, sites and ops as leaves; ``numbers`` says which line a width is."""
    rows = tree_rows(tree)
    timed = tree.time_percent is not None
    columns = ["model", "kind", "weight", "MACs per sample", "size"]
    columns += [*(["time"] if timed else []), "reads", "makes"]
    table = _table(
        "tree; reads and makes: widths by number", columns, {"MACs per sample", "size", "time"}
    )
    for row in rows:
        branch = row.branch
        cells = [row.label, branch.kind, "x".join(map(str, branch.shape))]
        cells += [f"{branch.macs:,}", format_bytes(float(branch.size_bytes))]
        cells += [f"{branch.time_percent:.1f} %"] if timed else []
        cells += [_numbers(branch.reads, numbers), _numbers(branch.makes, numbers)]
        table.add_row(*(Text(cell) for cell in cells))
    table.columns[0].no_wrap = True
    return table


def _numbers(names: Iterable[str], numbers: Mapping[str, int]) -> str:
    return few(str(n) for n in sorted({numbers[name] for name in names}))


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One line of the tree: the branch, or the mean of equal ones, and its name with guides."""

    label: str
    branch: Branch


def tree_rows(tree: Branch) -> list[TreeRow]:
    """The tree line by line; neighbours with equal numbers below equal names are one."""
    return [TreeRow(tree.name or "(model)", tree), *_rows_below(tree, "")]


def _rows_below(branch: Branch, indent: str) -> list[TreeRow]:
    groups = [list(group) for _, group in groupby(branch.children, _shape)]
    rows = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        one = group[0] if len(group) == 1 else _mean(group)
        name = one.name
        if len(group) > 1:
            name = f"{group[0].name} ... {group[-1].name} (each of {len(group)})"
        rows.append(TreeRow(f"{indent}{'`- ' if last else '|- '}{name}", one))
        rows += _rows_below(one, indent + ("   " if last else "|  "))
    return rows


def _shape(branch: Branch) -> Hashable:
    """What must be equal in branches that are shown as one; their own names may differ."""
    below = tuple((child.name, _shape(child)) for child in branch.children)
    # Two layers side by side with nothing below are told apart by name: they do different work.
    own = "" if below else branch.name
    return (own, branch.kind, branch.shape, branch.size_bytes, branch.macs, branch.pinned, below)


def _mean(group: Sequence[Branch]) -> Branch:
    """The first of equal branches, with the mean of their times and the widths of all."""
    times = [b.time_percent for b in group if b.time_percent is not None]
    below = zip(*(b.children for b in group), strict=True)
    return replace(
        group[0],
        time_percent=sum(times) / len(times) if times else None,
        makes=tuple(dict.fromkeys(name for b in group for name in b.makes)),
        reads=tuple(dict.fromkeys(name for b in group for name in b.reads)),
        children=tuple(_mean(children) for children in below),
    )


def widths_table(groups: Iterable[Sequence[WidthInfo]]) -> Table:
    """What may be made narrower; equal widths of equal layers are one line."""
    columns = ["", "width", "count", "kind", "exactness", "units", "size", "MACs per sample"]
    numeric = {"", "count", "units", "size", "MACs per sample"}
    table = _table("widths", [*columns, "coupled"], numeric)
    for number, group in enumerate(groups, 1):
        width = group[0]
        several = len(group) > 1
        coupled = places((c.tensor, c.dim) for c in width.coupled)
        cells = [
            str(number),
            pattern(width.name) if several else width.name,
            str(len(group)),
            width.kind,
            width.exactness if width.pinned is None else f"{width.exactness}, {width.pinned}",
            str(width.units),
            format_bytes(float(width.size_bytes)),
            f"{width.macs:,}",
            few(map(pattern, coupled) if several else coupled),
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
    for group in sorted(alike(pinned, lambda p: (p.op, p.reason)), key=len):
        names = places((pattern(p.tensor), p.dim) for p in group)
        sizes = sorted({p.size for p in group})
        cells = [group[0].op, group[0].reason, str(len(group)), few(map(str, sizes)), few(names)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def summary(found: Inspection) -> str:
    """Totals, then ops that no rule knows, formats that stay, and what no site covers."""
    size = format_bytes(float(found.size_bytes))
    share = 100 * found.mac_share
    lines = [
        f"{found.nodes} nodes, {found.macs:,} MACs per sample at the sites, {size}",
        f"{len(found.widths)} widths; exact ones reach {share:.1f} % of all MACs",
        f"{len(found.pinned)} dimensions pinned; analysed in {found.seconds:.2f} s",
    ]
    if found.pass_ms is not None:
        lines.append(f"one pass of one sample, op by op in torch: {found.pass_ms:.2f} ms")
    lines += [f"no rule for {op}: met {n} times, pins" for op, n in sorted(found.unknown.items())]
    kept = [(site.name, site.pinned) for site in found.sites if site.pinned]
    for group in alike(kept, lambda item: item[1]):
        lines.append(f"format pinned: {few(name for name, _ in group)}: {group[0][1]}")
    for group in alike(found.unsupported.items(), lambda item: item[1]):
        lines.append(f"not a site: {few(name for name, _ in group)}: {group[0][1]}")
    return "\n".join(lines)


def pattern(name: str) -> str:
    """A name with ``*`` for numbers of layers."""
    return _NUMBER.sub("*", name)


def places(found: Iterable[tuple[str, int]]) -> list[str]:
    """Tensors with all their dimensions: a.weight[0, 2]."""
    dims: dict[str, dict[int, None]] = {}
    for tensor, dim in found:
        dims.setdefault(tensor, {})[dim] = None
    return [f"{name}[{', '.join(map(str, numbers))}]" for name, numbers in dims.items()]


def few(names: Iterable[str]) -> str:
    """The first different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = len(different) - NAMES
    shown = ", ".join(different[:NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def alike(items: Iterable[ItemT], key: Callable[[ItemT], Hashable]) -> list[list[ItemT]]:
    """Items of equal key together, in the order of each group's first."""
    groups: dict[Hashable, list[ItemT]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _table(title: str, columns: Sequence[str], numeric: set[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in numeric else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in numeric)
    return table
