"""From labels to widths: interchangeable units, what couples them, and what is pinned and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import fx

from tersor.core.records import Exactness, WidthKind
from tersor.graph.axes.analysis import Walk
from tersor.graph.axes.labels import NONE, Dim, Flags, Labels, Reason, Rows
from tersor.graph.axes.rulebook import TAGS, arguments, kept_rows, op_name
from tersor.graph.contracts import Graph

_HASH_SEED = 20261124
_LINEAR = ("linear", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
Role = Literal["producer", "consumer", "follower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """One dimension of a stored tensor that a width runs through."""

    tensor: str
    dim: int
    role: Role
    per_unit: int  # elements of the dimension that one unit takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Units that are alike: each may go, with everything that is coupled to it.

    Attributes:
        name: The first producer's module path, with the kind where a tensor has several.
        labels: The unit's label, one a unit.
        least: So many units must stay: a top-k takes as many.
    """

    name: str
    kind: WidthKind
    exactness: Exactness
    labels: tuple[int, ...]
    couplings: tuple[Coupling, ...]
    least: int = 1

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A dimension of a stored tensor that stays whole, with the op that holds it."""

    tensor: str
    dim: int
    size: int
    op: str
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Every width of a graph.

    Attributes:
        unknown: Ops without a rule that met a width -> how often.
        seconds: What the analysis took.
    """

    graph: Graph
    widths: tuple[Width, ...]
    pinned: tuple[Pinned, ...]
    unknown: Mapping[str, int]
    seconds: float
    walk: Walk = field(repr=False)

    def __getitem__(self, name: str) -> Width:
        return next(w for w in self.widths if w.name == name)

    @property
    def labels(self) -> Labels:
        """The labels behind the widths."""
        return self.walk.labels

    def removed(self, gone: Mapping[str, Sequence[int]]) -> Flags:
        """Flags of the labels that go; width -> indices of its removed units."""
        flags = np.zeros(self.labels.count, dtype=np.bool_)
        for name, units in gone.items():
            labels = np.array(self[name].labels, dtype=np.int64)
            flags[labels[list(units)]] = True
        return flags

    def kept(self, dim: Dim, removed: Flags) -> Flags:
        """Which elements of a dimension stay."""
        return kept_rows(dim, self.labels, removed)

    def units_of(self, width: Width, dim: Dim) -> Rows:
        """For each element of a dimension the unit of a width that removes it, or -1 [N]."""
        place = np.full(self.labels.count, -1, dtype=np.int64)
        place[list(width.labels)] = np.arange(width.units)
        found = np.full(dim.size, -1, dtype=np.int64)
        if dim.is_free:
            return found
        for elements, leaves in _entries(self.labels, dim):
            hit = place[leaves] >= 0
            found[elements[hit]] = place[leaves[hit]]
        return found


def _entries(labels: Labels, dim: Dim) -> Iterator[tuple[Rows, Rows]]:
    """Pairs (elements, leaves): each element with each label whose removal removes it."""
    roots = labels.find(dim.rows)
    products = labels.expanded[roots]
    for column, is_product in zip(roots.T, products.T, strict=True):
        plain = np.flatnonzero(~is_product & (column != NONE))
        yield plain, column[plain]
        if not is_product.any():
            continue
        pairs = [(i, leaf) for i in np.flatnonzero(is_product).tolist()
                 for leaf in labels.leaves(int(column[i]))]  # fmt: skip
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        yield table[:, 0], table[:, 1]


def find_widths(graph: Graph, walk: Walk, seconds: float) -> Axes:
    """Group the labels of a walk into widths."""
    index = _Index.of(walk)
    roles = _roles(graph.module)
    widths: list[Width] = []
    taken: dict[str, int] = {}
    for leaves in index.groups():
        width = _width(walk, index, roles, leaves, taken)
        if width is not None:
            widths.append(width)
    return Axes(
        graph=graph,
        widths=tuple(widths),
        pinned=_pinned(walk, index),
        unknown=dict(walk.unknown),
        seconds=seconds,
        walk=walk,
    )


@dataclass(frozen=True)
class _Index:
    """Which dimensions of which stored tensors each leaf runs through."""

    places: list[tuple[str, int]]  # of each number below
    leaf: Rows
    place: Rows
    frozen: Flags
    axis: Rows

    @classmethod
    def of(cls, walk: Walk) -> "_Index":
        places: list[tuple[str, int]] = []
        leaves: list[Rows] = []
        numbers: list[Rows] = []
        for name, shape in walk.stored.items():
            for d, dim in enumerate(shape):
                if dim.is_free:
                    continue
                for _, found in _entries(walk.labels, dim):
                    leaves.append(found)
                    numbers.append(np.full(len(found), len(places), dtype=np.int64))
                places.append((name, d))
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            places,
            np.concatenate(leaves) if leaves else empty,
            np.concatenate(numbers) if numbers else empty,
            walk.labels.frozen,
            walk.labels.axis,
        )

    def groups(self) -> list[Rows]:
        """Leaves that run through the same dimensions equally often, not frozen, in order.

        Rows and columns of a square view do, too: leaves of different axes are no group.
        """
        rng = np.random.default_rng(_HASH_SEED)
        key = rng.integers(1, 2**62, size=max(1, len(self.places)), dtype=np.int64)
        leaves, back = np.unique(self.leaf, return_inverse=True)
        sums = np.zeros(len(leaves), dtype=np.int64)
        np.add.at(sums, back, key[self.place])  # wraps: a hash of the multiset of places
        alive = ~self.frozen[leaves]
        leaves, sums = leaves[alive], sums[alive]
        axes = self.axis[leaves]
        order = np.lexsort((leaves, axes, sums))
        differ = (np.diff(sums[order]) != 0) | (np.diff(axes[order]) != 0)
        borders = np.flatnonzero(differ) + 1
        found = [np.sort(part) for part in np.split(leaves[order], borders) if len(part)]
        return sorted(found, key=lambda part: int(part[0]))

    def through(self, leaf: int) -> dict[tuple[str, int], int]:
        """Dimensions that a leaf runs through, and how many elements it takes of each."""
        found: dict[tuple[str, int], int] = {}
        for number in self.place[self.leaf == leaf].tolist():
            place = self.places[number]
            found[place] = found.get(place, 0) + 1
        return found


def _roles(module: fx.GraphModule) -> dict[tuple[str, int], Role]:
    """What the dimensions of weights do: make a width, or read it."""
    found: dict[tuple[str, int], Role] = {}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in _LINEAR or name in _TRANSPOSED or name == "embedding":
            weight = arguments(node)["weight"]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                first, second = (1, 0) if name in (*_TRANSPOSED, "embedding") else (0, 1)
                found[str(weight.target), first] = "producer"
                if name != "embedding":
                    found[str(weight.target), second] = "consumer"
    return found


def _width(
    walk: Walk,
    index: _Index,
    roles: Mapping[tuple[str, int], Role],
    leaves: Rows,
    taken: dict[str, int],
) -> Width | None:
    through = index.through(int(leaves[0]))
    couplings = tuple(
        Coupling(tensor=t, dim=d, role=roles.get((t, d), "follower"), per_unit=n)
        for (t, d), n in through.items()
    )
    labels = walk.labels
    least = max(1, int(labels.least[leaves].max()))
    if len(leaves) <= least:
        return None  # a width of 1 has nothing to give
    kind: Any = TAGS[int(labels.tag[leaves].max())]
    first = next((c for c in couplings if c.role == "producer"), couplings[0])
    name = first.tensor.removesuffix(".weight")
    if kind in ("heads", "head_dim", "experts"):
        name = f"{name}:{kind}"
    taken[name] = taken.get(name, 0) + 1
    if taken[name] > 1:
        name = f"{name}#{taken[name]}"
    return Width(
        name=name,
        kind=kind,
        exactness="approximate" if labels.inexact[leaves].any() else "exact",
        labels=tuple(leaves.tolist()),
        couplings=couplings,
        least=least,
    )


def _pinned(walk: Walk, index: _Index) -> tuple[Pinned, ...]:
    labels = walk.labels
    found: list[Pinned] = []
    frozen = index.frozen[index.leaf]
    for number in np.unique(index.place[frozen]).tolist():
        leaf = int(index.leaf[frozen & (index.place == number)][0])
        reason: Reason = labels.reasons[int(labels.why[leaf])]
        tensor, dim = index.places[number]
        size = walk.stored[tensor][dim].size
        found.append(
            Pinned(
                tensor=tensor,
                dim=dim,
                size=size,
                op=reason.op,
                node=reason.node,
                reason=reason.text,
            )
        )
    return tuple(found)
