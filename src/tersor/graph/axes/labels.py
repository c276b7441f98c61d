"""Labels of elements: what must be removed together, and what may not be removed at all.

Every element of a parameter's dimension has a label. Labels that must go together are united
(union-find). A dimension that is viewed as a product, such as heads x head size, is *expanded*:
its element (h, d) goes if head h goes or if position d goes. Pure products of whole axes are not
enough: after two channel shuffles a quarter of the channels is one unit (FINDINGS 2).

Arrays of labels are [N, k]: N elements, each the product of up to k labels, NONE where there are
fewer. Work is vectorised over the elements wherever no product is involved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

NONE = 0  # no label: an element that is never removed


@dataclass(frozen=True, slots=True, eq=False)
class Dim:
    """One dimension of a tensor.

    Attributes:
        rows: Labels [N, k]; k is 0 where no element has any.
        zero: Whether the tensor is zero at what was removed, so that sums may run over it.
    """

    rows: Rows
    zero: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.rows)

    @property
    def is_free(self) -> bool:
        """Whether no element has a label."""
        return bool(self.rows.shape[1] == 0)


def free(size: int) -> Dim:
    """A dimension without labels: batch, space, tokens."""
    return Dim(np.zeros((size, 0), dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Reason:
    """Why labels are frozen."""

    op: str
    node: str
    text: str


@dataclass
class Labels:
    """All labels of one graph. Grows while rules run; ``leaves`` reads it at any time."""

    parent: Rows = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    axis: Rows = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    frozen: Flags = field(default_factory=lambda: np.zeros(1, dtype=np.bool_))
    inexact: Flags = field(default_factory=lambda: np.zeros(1, dtype=np.bool_))
    expanded: Flags = field(default_factory=lambda: np.zeros(1, dtype=np.bool_))
    why: Rows = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    tag: Rows = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    least: Rows = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    count: int = 1
    expansion: dict[int, tuple[int, ...]] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=lambda: [Reason("", "", "")])
    _reason_of: dict[Reason, int] = field(default_factory=dict)

    def fresh(self, size: int, *, zero: bool = True) -> Dim:
        """A dimension whose elements have new labels, one axis together."""
        start = self.count
        self._reserve(start + size)
        self.count = start + size
        rows = np.arange(start, start + size, dtype=np.int64)
        self.parent[start : self.count] = rows
        self.axis[start : self.count] = start
        return Dim(rows.reshape(size, 1), zero)

    def _reserve(self, wanted: int) -> None:
        have = len(self.parent)
        if wanted <= have:
            return
        grown = max(wanted, 2 * have)
        for name in ("parent", "axis", "frozen", "inexact", "expanded", "why", "tag", "least"):
            old = getattr(self, name)
            new = np.zeros(grown, dtype=old.dtype)
            new[:have] = old
            setattr(self, name, new)

    def reason(self, reason: Reason) -> int:
        """The number of a reason."""
        if reason not in self._reason_of:
            self._reason_of[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self._reason_of[reason]

    def find(self, labels: Rows) -> Rows:
        """The representative of each label, same shape."""
        roots: Rows = self.parent[labels]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self.parent[labels] = roots
        self.parent[NONE] = NONE
        return roots

    def root(self, label: int) -> int:
        """The representative of one label."""
        parent = self.parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = int(parent[label])
        return label

    def leaves(self, label: int) -> tuple[int, ...]:
        """The representatives whose removal removes a label; none for NONE."""
        label = self.root(label)
        if label == NONE:
            return ()
        if label not in self.expansion:
            return (label,)
        found: dict[int, None] = {}
        for part in self.expansion[label]:
            found.update(dict.fromkeys(self.leaves(part)))
        return tuple(found)

    def leaves_of(self, row: Iterable[int]) -> list[int]:
        """The leaves of a product of labels, each once."""
        found: dict[int, None] = {}
        for label in row:
            found.update(dict.fromkeys(self.leaves(int(label))))
        return list(found)

    def freeze(self, rows: Rows, why: int) -> None:
        """Nothing that would remove one of these elements may be removed."""
        for label in self._distinct_leaves(rows):
            if not self.frozen[label]:
                self.frozen[label] = True
                self.why[label] = why

    def mark_inexact(self, rows: Rows) -> None:
        """Removing these elements changes a statistic over them."""
        self.inexact[self._distinct_leaves(rows)] = True

    def mark(self, rows: Rows, tag: int) -> None:
        """Say what kind of width these elements are; the largest tag wins."""
        leaves = self._distinct_leaves(rows)
        self.tag[leaves] = np.maximum(self.tag[leaves], tag)

    def require(self, rows: Rows, count: int) -> None:
        """So many of these elements must stay."""
        leaves = self._distinct_leaves(rows)
        self.least[leaves] = np.maximum(self.least[leaves], count)

    def _distinct_leaves(self, rows: Rows) -> Rows:
        roots = np.unique(self.find(np.unique(rows)))
        roots = roots[roots != NONE]
        plain: Rows = roots[~self.expanded[roots]]
        products = roots[self.expanded[roots]]
        if not len(products):
            return plain
        found = {leaf for label in products.tolist() for leaf in self.leaves(label)}
        leaves: Rows = np.unique(np.array([*plain.tolist(), *found], dtype=np.int64))
        return leaves

    def unify(self, a: Dim, b: Dim, why: int) -> None:
        """Elements at the same place go together."""
        if a is b or a.rows is b.rows:
            return
        if a.is_free or b.is_free:
            if not (a.is_free and b.is_free):
                self.freeze(a.rows if b.is_free else b.rows, why)
            return
        if a.rows.shape == b.rows.shape and np.array_equal(a.rows, b.rows):
            return
        if a.rows.shape[1] == b.rows.shape[1] == 1:
            self._unify_plain(a.rows[:, 0], b.rows[:, 0], why)
            return
        for left, right in zip(a.rows.tolist(), b.rows.tolist(), strict=True):
            self.unify_element(left, right, why)

    def _unify_plain(self, a: Rows, b: Rows, why: int) -> None:
        left, right = self.find(a), self.find(b)
        special = (left == NONE) | (right == NONE)
        for labels in (left, right):
            special |= self.expanded[labels] | self.frozen[labels]
        self._unite(left[~special], right[~special])
        special &= left != right
        for x, y in zip(a[special].tolist(), b[special].tolist(), strict=True):
            self.unify_element([x], [y], why)

    def _unite(self, a: Rows, b: Rows) -> None:
        """Unite pairs of labels, none of them expanded."""
        while True:
            left, right = self.find(a), self.find(b)
            differ = left != right
            if not differ.any():
                return
            low = np.minimum(left[differ], right[differ])
            high = np.maximum(left[differ], right[differ])
            self.parent[high] = low  # of equal highs one wins; the next round unites the rest
            self._inherit(high)

    def _inherit(self, labels: Rows) -> None:
        """Roots take over what was known of the labels below them."""
        roots = self.find(labels)
        self.inexact[roots[self.inexact[labels]]] = True
        np.maximum.at(self.tag, roots, self.tag[labels])
        np.maximum.at(self.least, roots, self.least[labels])
        hit = self.frozen[labels]
        self.frozen[roots[hit]] = True
        self.why[roots[hit]] = np.where(
            self.why[roots[hit]] == 0, self.why[labels[hit]], self.why[roots[hit]]
        )

    def unify_element(self, a: Sequence[int], b: Sequence[int], why: int) -> None:
        """One element described by two products: both mean the same."""
        left, right = self.leaves_of(a), self.leaves_of(b)
        if set(left) == set(right):
            return
        left_free = [x for x in left if not self.frozen[x]]
        right_free = [x for x in right if not self.frozen[x]]
        if not left_free or not right_free:
            self.freeze(np.array(left_free + right_free, dtype=np.int64), why)
        elif len(left_free) == len(right_free):
            for x, y in zip(*self._paired(left_free, right_free), strict=True):
                self._unite_two(x, y, why)
        elif len(left_free) == 1 and left_free[0] not in right_free:
            self._expand(left_free[0], right_free)
        elif len(right_free) == 1 and right_free[0] not in left_free:
            self._expand(right_free[0], left_free)
        else:
            self.freeze(np.array(left_free + right_free, dtype=np.int64), why)

    @staticmethod
    def _paired(left: list[int], right: list[int]) -> tuple[list[int], list[int]]:
        """What both products have in common is paired with itself."""
        common = [x for x in left if x in right]
        rest = [[x for x in side if x not in common] for side in (left, right)]
        return common + rest[0], common + rest[1]

    def _expand(self, label: int, parts: Sequence[int]) -> None:
        self.expansion[label] = tuple(parts)
        self.expanded[label] = True
        self._hand_down(np.full(len(parts), label), np.array(parts, dtype=np.int64))

    def _unite_two(self, a: int, b: int, why: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        if a in self.expansion and b in self.expansion:
            self.unify_element([a], [b], why)
            return
        if a in self.expansion:
            a, b = b, a
        if b in self.expansion and a in self.leaves(b):
            self.freeze(np.array([b], dtype=np.int64), why)
            return
        self.parent[a] = b
        self._inherit(np.array([a], dtype=np.int64))

    def split(self, dim: Dim, factors: Sequence[int], why: int) -> list[Dim]:
        """View a dimension as a product of dimensions, the last running fastest."""
        if len(factors) == 1:
            return [dim]
        if dim.is_free:
            return [free(size) for size in factors]
        if self._is_virgin(dim.rows):
            return self._factor(dim, factors)
        rows = self._resolved(dim.rows)
        columns: list[list[Rows]] = [[] for _ in factors]
        for column in rows.T:
            place = self._factor_of(column, factors)
            if place is None:
                place = self._couple(column, factors, why)
            j, values = place
            columns[j].append(values)
        return [
            Dim(np.stack(found, 1), dim.zero) if found else free(size)
            for found, size in zip(columns, factors, strict=True)
        ]

    def are_single(self, rows: Rows) -> bool:
        """Whether each element has one label of its own, or none."""
        if rows.shape[1] != 1:
            return False
        roots = self.find(rows[:, 0])
        roots = roots[roots != NONE]
        return not self.expanded[roots].any() and len(np.unique(roots)) == len(roots)

    def _is_virgin(self, rows: Rows) -> bool:
        """A contiguous range of one axis that no view has split and nothing has frozen."""
        if rows.shape[1] != 1 or rows[0, 0] == NONE:
            return False
        labels = rows[:, 0]
        if self.axis[labels[0]] != self.axis[labels[-1]] or not (np.diff(labels) == 1).all():
            return False
        roots = self.find(labels)
        if self.expanded[roots].any() or self.frozen[roots].any():
            return False
        return len(np.unique(roots)) == len(roots)

    def _factor(self, dim: Dim, factors: Sequence[int]) -> list[Dim]:
        roots = self.find(dim.rows[:, 0])
        found = [self.fresh(size, zero=dim.zero) for size in factors]
        index = np.indices(factors).reshape(len(factors), -1)
        parts = np.stack([f.rows[i, 0] for f, i in zip(found, index, strict=True)], 1)
        for root, part in zip(roots.tolist(), parts.tolist(), strict=True):
            self.expansion[root] = tuple(part)
        self.expanded[roots] = True
        for column in parts.T:
            self._hand_down(roots, column)
            np.maximum.at(self.tag, column, self.tag[roots])
        return found

    def _hand_down(self, labels: Rows, parts: Rows) -> None:
        """What holds for a product holds for its factors: n of each are at least n products."""
        self.inexact[parts[self.inexact[labels]]] = True
        np.maximum.at(self.least, parts, self.least[labels])

    def _resolved(self, rows: Rows) -> Rows:
        """Rows in terms of leaves, without frozen ones."""
        roots = self.find(rows)
        if not self.expanded[roots].any():
            return np.where(self.frozen[roots], NONE, roots)
        cache: dict[tuple[int, ...], list[int]] = {}
        found = []
        for row in map(tuple, roots.tolist()):
            if row not in cache:
                cache[row] = [x for x in self.leaves_of(row) if not self.frozen[x]]
            found.append(cache[row])
        width = max((len(r) for r in found), default=0)
        table = np.full((len(found), width), NONE, dtype=np.int64)
        for i, row_leaves in enumerate(found):
            table[i, : len(row_leaves)] = row_leaves
        return table

    @staticmethod
    def _factor_of(column: Rows, factors: Sequence[int]) -> tuple[int, Rows] | None:
        """The factor along which alone a column varies."""
        grid = column.reshape(factors)
        for j, size in enumerate(factors):
            lines = np.moveaxis(grid, j, 0).reshape(size, -1)
            if (lines == lines[:, :1]).all():
                return j, lines[:, 0].copy()
        return None

    def _couple(self, column: Rows, factors: Sequence[int], why: int) -> tuple[int, Rows]:
        """No product: what shares a place along the largest factor goes together."""
        j = int(np.argmax(factors))
        lines = np.moveaxis(column.reshape(factors), j, 0).reshape(factors[j], -1)
        values = np.full(factors[j], NONE, dtype=np.int64)
        for i, line in enumerate(lines.tolist()):
            labels = [x for x in dict.fromkeys(line) if x != NONE]
            for other in labels[1:]:
                self._unite_two(labels[0], other, why)
            values[i] = labels[0] if labels else NONE
        return j, values

    @staticmethod
    def merge(dims: Sequence[Dim]) -> Dim:
        """Several dimensions as one, the last running fastest."""
        if len(dims) == 1:
            return dims[0]
        sizes = [d.size for d in dims]
        if all(d.is_free for d in dims):
            return free(int(np.prod(sizes)))
        index = np.indices(sizes).reshape(len(sizes), -1)
        rows = [d.rows[i] for d, i in zip(dims, index, strict=True) if not d.is_free]
        labelled = [d for d in dims if not d.is_free]
        return Dim(np.concatenate(rows, 1), all(d.zero for d in labelled))
