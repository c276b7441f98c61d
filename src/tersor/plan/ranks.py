"""Many plans as one array of ranks, priced all at once.

The rank of a level is its place among its site's usable levels: 0 is the native one, counts fall from
there. A search prices thousands of plans a round; as mappings that takes longer than a look.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.core.levels import KEPT
from tersor.core.rank_levels import is_eight_bit
from tersor.core.records import Level
from tersor.plan.problem import Problem
from tersor.plan.products import Reduced, reduce_terms

Array = np.ndarray[Any, np.dtype[np.float64]]
Ranks = np.ndarray[Any, np.dtype[np.int64]]  # [plans, sites]


class Grid:
    """All plans of a problem.

    Args:
        problem: Its levels, table and size terms; budgets are not read.
    """

    def __init__(self, problem: Problem) -> None:
        rows = problem.levels()
        self.problem = problem
        self.sites = tuple(rows)
        self.levels = tuple(tuple(row) for row in rows.values())
        self.errors: tuple[Array, ...] = tuple(
            np.array([max(0.0, c.error) for c in row.values()]) for row in rows.values()
        )
        self._column = {site: i for i, site in enumerate(self.sites)}
        self._rank = tuple({v: i for i, v in enumerate(row)} for row in self.levels)
        table = problem.table
        native = table.choice.precision
        self._fixed_ms = table.glue_ms
        self._op_ms: dict[int, Array] = {}
        for site, prices in table.ops.items():
            alone = prices.get(native, 0.0)
            if site in self._column:
                i = self._column[site]
                own = [prices.get(str(level), alone) for level in self.levels[i]]
                self._op_ms[i] = np.array(own, dtype=np.float64)
            else:
                self._fixed_ms += alone
        self._terms = reduce_terms(problem, table.terms)
        self._sizes = reduce_terms(problem, problem.size_terms)
        self._bytes: tuple[Array, ...] = tuple(
            np.array([problem.bytes_of(c) for c in row.values()], dtype=np.float64)
            for row in rows.values()
        )
        self._int8 = self._readers()

    def _readers(self) -> dict[str, list[tuple[int, int]]]:
        """Tensor -> (site, rank) of its int8 readers; a site may be one at several levels."""
        found: dict[str, list[tuple[int, int]]] = {}
        for site, tensor in self.problem.tensors.items():
            i = self._column.get(site)
            if i is None:
                continue
            own = [(i, rank) for level, rank in self._rank[i].items() if is_eight_bit(level)]
            if own:
                found.setdefault(tensor, []).extend(own)
        return found

    def encode(self, plans: Sequence[Mapping[str, Level]]) -> Ranks:
        """Ranks of plans that list every site."""
        rows = [[rank[p[s]] for s, rank in zip(self.sites, self._rank, strict=True)] for p in plans]
        return np.array(rows, dtype=np.int64).reshape(len(plans), len(self.sites))

    def decode(self, row: Ranks) -> dict[str, Level]:
        """The plan of one row [sites]."""
        return {s: v[int(i)] for s, v, i in zip(self.sites, self.levels, row, strict=True)}

    def settle_(self, x: Ranks) -> Ranks:
        """Leave alone, in place, what is gone with a branch; returns the same array."""
        for branch, sites in self.problem.inside.items():
            i = self._column.get(branch)
            if i is None:
                continue
            gone = np.array([level != KEPT for level in self.levels[i]])[x[:, i]]
            for site in sites:
                if site in self._column:
                    x[gone, self._column[site]] = 0
        return x

    def ms(self, x: Ranks) -> Array:
        """Predicted latencies [plans]."""
        total = np.full(len(x), self._fixed_ms)
        for i, prices in self._op_ms.items():
            total += prices[x[:, i]]
        for tensor, readers in self._int8.items():
            reads = np.zeros(len(x), dtype=bool)
            for i, rank in readers:
                reads |= x[:, i] == rank
            total += self.problem.table.quantizers.get(tensor, 0.0) * reads
        self._add_(total, self._terms, x)
        return total * self.problem.table.scale

    def size_bytes(self, x: Ranks) -> Array:
        """Bytes [plans]."""
        total = np.full(len(x), float(self.problem.fixed_bytes))
        for i, sizes in enumerate(self._bytes):
            total += sizes[x[:, i]]
        self._add_(total, self._sizes, x)
        return total

    def _add_(self, total: Array, terms: Sequence[Reduced], x: Ranks) -> None:
        for term in terms:
            total += term.values[tuple(x[:, self._column[site]] for site in term.sites)]

    def near(self, row: Ranks, reach: int) -> list[tuple[int, int]]:
        """Moves of one site: (site, rank) of any other format, of the next few counts each way."""
        return [
            (i, rank)
            for i, (levels, here) in enumerate(zip(self.levels, row.tolist(), strict=True))
            for rank in range(len(levels))
            if rank != here and (isinstance(levels[0], str) or abs(rank - here) <= reach)
        ]
