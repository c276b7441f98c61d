"""Union-find, products and freezing against sets that are computed the slow way."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.graph.axes.labels import NONE, Dim, Labels, Reason, free
from tersor.graph.axes.rulebook import kept_rows

Pairs = list[tuple[int, int]]
N = 8


def labels_of(size: int = N) -> tuple[Labels, Dim]:
    labels = Labels()
    return labels, labels.fresh(size)


@dataclass
class Slow:
    """What goes together, as sets of elements; frozen sets never go."""

    classes: list[set[int]] = field(default_factory=lambda: [{i} for i in range(N)])
    frozen: set[int] = field(default_factory=set)

    def of(self, element: int) -> set[int]:
        return next(c for c in self.classes if element in c)

    def unite(self, a: int, b: int) -> None:
        left, right = self.of(a), self.of(b)
        if left is right:
            return
        if left & self.frozen or right & self.frozen:
            self.frozen |= left | right
            return
        self.classes.remove(right)
        left |= right

    def freeze(self, element: int) -> None:
        self.frozen |= self.of(element)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("unite"), st.integers(0, N - 1), st.integers(0, N - 1)),
        st.tuples(st.just("freeze"), st.integers(0, N - 1), st.just(0)),
    ),
    max_size=16,
)


@given(steps)
def test_plain_labels_follow_the_slow_sets(found: list[tuple[str, int, int]]):
    labels, dim = labels_of()
    slow = Slow()
    for step, a, b in found:
        if step == "unite":
            labels.unify(Dim(dim.rows[a : a + 1]), Dim(dim.rows[b : b + 1]), 0)
            slow.unite(a, b)
        else:
            labels.freeze(dim.rows[a : a + 1], 0)
            slow.freeze(a)
    roots = labels.find(dim.rows)[:, 0]
    for a in range(N):
        assert bool(labels.frozen[roots[a]]) == (a in slow.frozen)
        for b in range(N):
            if a not in slow.frozen:
                assert (roots[a] == roots[b]) == (b in slow.of(a))


@given(st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)), min_size=1, max_size=20))
def test_a_whole_dimension_at_once_is_the_same_as_one_element_at_a_time(pairs: Pairs):
    found = []
    for at_once in (True, False):
        labels, dim = labels_of()
        left, right = (dim.rows[[p[i] for p in pairs]] for i in range(2))
        if at_once:
            labels.unify(Dim(left), Dim(right), 0)
        else:
            for a, b in zip(left, right, strict=True):
                labels.unify_element(a.tolist(), b.tolist(), 0)
        found.append(labels.find(dim.rows)[:, 0])
    same = [roots[:, None] == roots[None, :] for roots in found]
    assert np.array_equal(*same)


def removed_of(labels: Labels, gone: list[int]) -> np.ndarray:
    flags = np.zeros(labels.count, dtype=np.bool_)
    flags[gone] = True
    return flags


@given(st.lists(st.integers(2, 4), min_size=2, max_size=3), st.data())
def test_an_element_of_a_product_goes_if_any_of_its_factors_goes(
    factors: list[int], data: st.DataObject
):
    labels, dim = labels_of(int(np.prod(factors)))
    parts = labels.split(dim, factors, 0)
    gone = [data.draw(st.sets(st.integers(0, n - 1))) for n in factors]
    flags = removed_of(
        labels, [int(p.rows[i, 0]) for p, g in zip(parts, gone, strict=True) for i in g]
    )
    wanted = [
        not any(i in g for i, g in zip(place, gone, strict=True)) for place in np.ndindex(*factors)
    ]
    assert kept_rows(dim, labels, flags).tolist() == wanted
    merged = labels.merge(parts)
    assert kept_rows(merged, labels, flags).tolist() == wanted
    turned = labels.merge(parts[::-1])
    grid = np.array(wanted).reshape(factors).T
    assert kept_rows(turned, labels, flags).tolist() == grid.reshape(-1).tolist()


@given(st.permutations(range(3)))
def test_a_view_back_finds_the_factors_again(order: list[int]):
    factors = [2, 3, 4]
    labels, dim = labels_of(24)
    parts = labels.split(dim, factors, 0)
    merged = labels.merge([parts[i] for i in order])
    again = labels.split(merged, [factors[i] for i in order], 0)
    for i, part in zip(order, again, strict=True):
        assert np.array_equal(labels.find(part.rows), labels.find(parts[i].rows))


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 4), min_size=2, max_size=2),
    st.lists(st.integers(2, 4), min_size=2, max_size=2),
)
def test_two_views_of_one_dimension_remove_whole_elements(first: list[int], second: list[int]):
    """Views that cut across each other couple units until both can follow: 6 as 2 x 3 and 3 x 2."""
    size = int(np.lcm(np.prod(first), np.prod(second)))
    labels, dim = labels_of(size)
    views = [[n, size // n] for n in (first[0], second[0])]
    parts = [p for factors in views for p in labels.split(dim, factors, 0)]
    leaves = {leaf for p in parts for row in p.rows.tolist() for leaf in labels.leaves_of(row)}
    for leaf in leaves:
        flags = removed_of(labels, [leaf])
        kept = kept_rows(dim, labels, flags)
        for factors, (rows, columns) in zip(views, (parts[:2], parts[2:]), strict=True):
            grid = kept_rows(rows, labels, flags)[:, None] & kept_rows(columns, labels, flags)
            assert np.array_equal(grid, kept.reshape(factors))


def test_freezing_a_product_freezes_its_factors():
    labels, dim = labels_of(6)
    heads, size = labels.split(dim, [2, 3], 0)
    labels.freeze(dim.rows[:1], labels.reason(Reason("op", "node", "text")))
    frozen = labels.frozen
    assert frozen[heads.rows[:, 0]].tolist() == [True, False]
    assert frozen[size.rows[:, 0]].tolist() == [True, False, False]
    assert labels.reasons[int(labels.why[heads.rows[0, 0]])].text == "text"


def test_a_product_meets_plain_labels_and_becomes_what_they_are():
    labels, plain = labels_of(6)
    rows, columns = labels.fresh(2), labels.fresh(3)
    labels.unify(plain, labels.merge([rows, columns]), 0)
    assert labels.leaves(int(plain.rows[4, 0])) == (rows.rows[1, 0], columns.rows[1, 0])


def test_free_dimensions_hold_what_they_meet():
    labels, dim = labels_of(3)
    why = labels.reason(Reason("op", "node", "text"))
    labels.unify(free(3), dim, why)
    assert labels.frozen[dim.rows].all()
    assert labels.why[dim.rows].tolist() == [[why]] * 3


def test_no_label_is_never_removed():
    labels, dim = labels_of(2)
    rows = np.array([[NONE], [int(dim.rows[0, 0])]])
    flags = removed_of(labels, [NONE, int(dim.rows[0, 0])])
    assert kept_rows(Dim(rows), labels, flags).tolist() == [True, False]
    assert labels.leaves(NONE) == ()


@pytest.mark.parametrize("first", [True, False])
def test_what_is_known_of_labels_survives_their_union(first: bool):
    labels, dim = labels_of(2)
    other = labels.fresh(2)
    known = dim if first else other
    labels.mark_inexact(known.rows)
    labels.mark(known.rows, 3)
    labels.unify(dim, other, 0)
    roots = labels.find(other.rows)
    assert labels.inexact[roots].all()
    assert labels.tag[roots].tolist() == [[3], [3]]


def test_a_split_inherits_what_was_known():
    labels, dim = labels_of(4)
    labels.mark_inexact(dim.rows)
    labels.mark(dim.rows, 2)
    for part in labels.split(dim, [2, 2], 0):
        assert labels.inexact[part.rows].all()
        assert labels.tag[part.rows].tolist() == [[2], [2]]
