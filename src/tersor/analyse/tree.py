"""A model's widths with what each takes part in, and its modules as a tree of sites."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from tersor.analyse.inspection import Branch, Coupled, PinnedInfo, WidthInfo
from tersor.analyse.widths import kept_by
from tersor.core.records import Site
from tersor.graph.axes import Axes, Coupling
from tersor.graph.axes.labels import Dim
from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.rulebook import op_name
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, parameters_by_name

_CALL_NUMBER = re.compile(r"@\d+$")  # of a module that is called more than once


def sample_macs(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates of one sample by node; nodes without any are left out."""
    batch = graph.example[0].shape[0]
    found = {node.name: node_macs(graph, node) for node in graph.module.graph.nodes}
    return {name: macs // batch for name, macs in found.items() if macs}


def width_infos(
    graph: Graph, axes: Axes, macs: Mapping[str, int], keep: Sequence[str] = ()
) -> tuple[WidthInfo, ...]:
    """Every width, with the bytes and multiply-accumulates that it takes part in.

    Args:
        graph: The graph that was analysed.
        axes: Its widths.
        macs: Of one sample, by node.
        keep: Patterns of layers to leave alone: a width that runs through one stays whole.
    """
    reached = _macs_by_width(graph, axes, macs)
    sizes = {n: t.numel() * t.element_size() for n, t in parameters_by_name(graph.module).items()}
    return tuple(
        WidthInfo(
            name=width.name,
            kind=width.kind,
            exactness=width.exactness,
            units=width.units,
            size_bytes=sum(sizes[name] for name in {c.tensor for c in width.couplings}),
            macs=reached[index],
            coupled=tuple(_coupled(c) for c in width.couplings),
            pinned=kept_by(width, keep),
        )
        for index, width in enumerate(axes.widths)
    )


def pinned_infos(axes: Axes) -> tuple[PinnedInfo, ...]:
    """Every dimension of a stored tensor that stays whole."""
    return tuple(
        PinnedInfo(
            tensor=p.tensor, dim=p.dim, size=p.size, op=p.op, node=p.node, reason=p.reason
        )
        for p in axes.pinned
    )  # fmt: skip


def _coupled(coupling: Coupling) -> Coupled:
    return Coupled(
        tensor=coupling.tensor,
        dim=coupling.dim,
        role=coupling.role,
        per_unit=coupling.per_unit,
    )


def _macs_by_width(graph: Graph, axes: Axes, macs: Mapping[str, int]) -> list[int]:
    reach = _Reach(axes)
    totals = [0] * len(axes.widths)
    for node in graph.module.graph.nodes:
        if node.name in macs:
            for index in reach.through(node):
                totals[index] += macs[node.name]
    return totals


class _Reach:
    """Which widths, by number, run through a node's inputs and output."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._width = np.full(axes.labels.count, -1, dtype=np.int64)
        for index, width in enumerate(axes.widths):
            self._width[list(width.labels)] = index
        self._known: dict[int, frozenset[int]] = {}

    def through(self, node: fx.Node) -> frozenset[int]:
        found: set[int] = set()
        for source in (node, *node.all_input_nodes):
            for dim in self._axes.walk.shapes.get(source) or ():
                if isinstance(dim, Dim) and not dim.is_free:
                    found |= self._of(dim)
        return frozenset(found)

    def _of(self, dim: Dim) -> frozenset[int]:
        key = id(dim.rows)  # dimensions share their rows along a graph, and the walk holds them
        if key not in self._known:
            labels = self._axes.labels
            roots = np.unique(labels.find(dim.rows))
            products = labels.expanded[roots]
            leaves = set(roots[~products].tolist())
            for root in roots[products].tolist():
                leaves.update(labels.leaves(root))
            numbers = self._width[np.fromiter(leaves, dtype=np.int64, count=len(leaves))]
            self._known[key] = frozenset(numbers[numbers >= 0].tolist())
        return self._known[key]


Path = tuple[str, ...]


@dataclass
class _Draft:
    """A branch while nodes and tensors are still added to it; numbers are its own."""

    kind: str = ""
    site: Site | None = None
    size_bytes: int = 0
    macs: int = 0
    time_ms: float = 0.0
    makes: dict[str, None] = field(default_factory=dict)
    reads: dict[str, None] = field(default_factory=dict)
    children: dict[str, "_Draft"] = field(default_factory=dict)

    def at(self, path: Path) -> "_Draft":
        """The draft below this one, made where it is missing."""
        here = self
        for part in path:
            here = here.children.setdefault(part, _Draft())
        return here


def grow(
    graph: Graph,
    axes: Axes,
    sites: Sequence[Site],
    macs: Mapping[str, int],
    times_ms: Mapping[str, float] | None = None,
) -> Branch:
    """The tree of a model: modules as branches, sites and ops with multiply-accumulates as leaves.

    Modules that store and multiply nothing are no branches; their time is in what holds them.

    Args:
        graph: The graph that was analysed.
        axes: Its widths.
        sites: Its format sites.
        macs: Of one sample, by node.
        times_ms: Of a pass, by node; None: no shares.
    """
    root = _Draft()
    covered = {op: tuple(site.name.split(".")) for site in sites for op in site.ops}
    for node in graph.module.graph.nodes:  # first of all: branches stand in the graph's order
        if node.op == "call_function":
            place = covered.get(node.name) or _place(graph, node, node.name in macs)
            here = root.at(place)
            here.macs += macs.get(node.name, 0)
            here.time_ms += (times_ms or {}).get(node.name, 0.0)
            if place and place[-1] == _op_leaf(node):
                here.kind = "op"
    homes = _add_sites(root, sites)
    for name, tensor in parameters_by_name(graph.module).items():
        root.at(_home(name, homes)).size_bytes += tensor.numel() * tensor.element_size()
    for width in axes.widths:
        for coupling in width.couplings:
            here = root.at(_home(coupling.tensor, homes))
            side = here.makes if coupling.role == "producer" else here.reads
            side[width.name] = None
    _name_modules(root, graph.module.graph.nodes)
    total = None if times_ms is None else sum(times_ms.values())
    return _branch(root, (), total)


def _add_sites(root: _Draft, sites: Iterable[Site]) -> dict[str, Path]:
    """Weight -> where its site stands."""
    homes = {}
    for site in sites:
        homes[site.weight] = tuple(site.name.split("."))
        here = root.at(homes[site.weight])
        here.kind, here.site = site.op_kind, site
    return homes


def _home(tensor: str, homes: Mapping[str, Path]) -> Path:
    """Where a stored tensor belongs: at its site, else at the module that holds it."""
    return homes.get(tensor) or tuple(tensor.split("."))[:-1]


def _place(graph: Graph, node: fx.Node, has_macs: bool) -> Path:
    """Where a node that no site covers belongs: at the weight it multiplies with, else by itself."""
    stack = _stack(node)
    path: Path = tuple(stack[-1][0].split(".")) if stack and stack[-1][0] else ()
    if not has_macs:
        return path
    for source in node.all_input_nodes:
        if source.op == "get_attr" and attribute(graph.module, str(source.target)).dim() >= 2:
            return _home(str(source.target), {})
    return (*path, _op_leaf(node))


def _op_leaf(node: fx.Node) -> str:
    return f"({op_name(node)})"


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Modules around a node, outermost first: path and class."""
    found = (node.meta.get("nn_module_stack") or {}).values()
    return [(_CALL_NUMBER.sub("", path), str(kind).rpartition(".")[2]) for path, kind in found]


def _name_modules(root: _Draft, nodes: Iterable[fx.Node]) -> None:
    """Classes of modules; what is a site or an op has its kind."""
    kinds = {path: kind for node in nodes for path, kind in _stack(node)}
    for path, kind in kinds.items():
        here: _Draft | None = root
        for part in path.split(".") if path else ():
            here = here and here.children.get(part)
        if here is not None and not here.kind:
            here.kind = kind


def _branch(draft: _Draft, path: Path, total_ms: float | None) -> Branch:
    children = [_branch(d, (*path, name), total_ms) for name, d in draft.children.items()]
    time_percent = None
    if total_ms is not None:
        own = 100 * draft.time_ms / total_ms if total_ms else 0.0
        time_percent = own + sum(c.time_percent or 0.0 for c in children)
    return Branch(
        name=path[-1] if path else "",
        path=".".join(path),
        kind=draft.kind,
        shape=() if draft.site is None else draft.site.shape,
        size_bytes=draft.size_bytes + sum(c.size_bytes for c in children),
        macs=draft.macs + sum(c.macs for c in children),
        time_percent=time_percent,
        makes=tuple(draft.makes),
        reads=tuple(name for name in draft.reads if name not in draft.makes),
        pinned=None if draft.site is None else draft.site.pinned,
        children=tuple(c for c in children if c.size_bytes or c.macs),
    )
