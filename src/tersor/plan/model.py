"""The variables and rows of the program that a problem is.

One binary for each (site, level); one variable for each tensor that int8 sites read, as its
quantiser is paid once however many readers it has; and for each group of sites that a term
couples one variable y >= 0 a combination of their levels, tied to the binaries by its marginals:
the sum of y over all other sites' levels is the binary of (site, level), or the sum of those that
no term tells apart. With the binaries whole, that leaves the one combination which they chose.

Budgets are rows. Everything is scaled to the order of 1 (milliseconds and bytes by the budget,
errors likewise), as raw bytes beside raw errors would meet the solver's absolute tolerances.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array

from tersor.core.rank_levels import is_eight_bit
from tersor.core.records import Level
from tersor.plan.highs import Row, Vector
from tersor.plan.problem import CONSTRAINTS, Constraint, Objective, Problem
from tersor.plan.products import Block, Reduced, blocks_of, home_of, reduce_terms

# A site leaves its native format only for more than this share of the objective: fewer formats.
FORMAT_PENALTY = 1e-6
# Among equal plans, the one that is better in the other quantities. Bytes tie often (int8 weights
# take the same with and without int8 activations), so there the weight must be seen by the solver.
OTHER_QUANTITIES: dict[Objective, float] = {"latency": 1e-4, "error": 1e-6, "size": 1e-5}

Entry = tuple[int, int, float]  # row, column, value


@dataclass(frozen=True, slots=True)
class Model:
    """Columns: the (site, level) pairs in order, then tensors, then the blocks' combinations."""

    columns: tuple[tuple[str, Level], ...]
    readers: tuple[tuple[int, ...], ...]  # of each tensor: the columns of its int8 readers
    blocks: tuple[Block, ...]
    coefficients: Mapping[Objective, Vector]
    constants: Mapping[Objective, float]
    native: Mapping[str, Level]

    @classmethod
    def of(cls, problem: Problem) -> "Model":
        """The program of a problem.

        Raises:
            ConfigError: A term has more combinations than a plan can take.
        """
        table, levels = problem.table, problem.levels()
        columns = tuple((site, level) for site, row in levels.items() for level in row)
        readers: dict[str, list[int]] = {}
        for i, (site, level) in enumerate(columns):
            if is_eight_bit(level) and site in problem.tensors:
                readers.setdefault(problem.tensors[site], []).append(i)
        latency = reduce_terms(problem, table.terms)
        size = reduce_terms(problem, problem.size_terms)
        blocks = blocks_of([*latency, *size])
        layout = _Layout(columns, len(readers), blocks)
        quantizers = [table.quantizers.get(t, 0.0) for t in readers]
        own = {
            "latency": [*(_price(problem, site, level) for site, level in columns), *quantizers],
            "size": [float(problem.bytes_of(levels[s][v])) for s, v in columns],
            "error": [levels[s][v].error for s, v in columns],
        }
        ms, ms_fixed = layout.coefficients(own["latency"], latency)
        n_bytes, bytes_fixed = layout.coefficients(own["size"], size)
        errors, _ = layout.coefficients(own["error"], [])
        fixed = table.glue_ms + sum(
            row.get(table.choice.precision, 0.0)
            for site, row in table.ops.items()
            if site not in levels
        )
        return cls(
            columns=columns,
            readers=tuple(tuple(r) for r in readers.values()),
            blocks=blocks,
            coefficients={"latency": ms * table.scale, "size": n_bytes, "error": errors},
            constants={
                "latency": (fixed + ms_fixed) * table.scale,
                "size": problem.fixed_bytes + bytes_fixed,
                "error": 0.0,
            },
            native=problem.native,
        )

    @property
    def n(self) -> int:
        """How many variables."""
        return len(self.columns) + len(self.readers) + sum(block.size for block in self.blocks)

    @property
    def is_choice(self) -> Vector:
        """Only sites need integrality: rows pin tensors and combinations once those are chosen."""
        whole = np.zeros(self.n)
        whole[: len(self.columns)] = 1.0
        return whole

    def cost(self, objective: Objective) -> Vector:
        """What is minimised: the objective, and what breaks its ties."""
        groups = self._groups()
        total = np.zeros(self.n)
        for name, values in self.coefficients.items():
            if name == objective:
                total += values / _typical(values, groups)
            else:
                total += values / _largest(values, groups) * OTHER_QUANTITIES[objective]
        changed = [isinstance(v, str) and v != self.native[s] for s, v in self.columns]
        total[: len(self.columns)] += FORMAT_PENALTY * np.array(changed, dtype=np.float64)
        return total

    def _groups(self) -> list[slice]:
        """Variables of which a plan takes one: a site's, a tensor's, a block's."""
        sizes = [len(row) for row in _rows(self.columns).values()]
        sizes += [1] * len(self.readers) + [block.size for block in self.blocks]
        ends = np.cumsum(sizes).tolist()
        return [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]

    def structure(self) -> Row:
        """One level a site; a tensor is quantised if any reader is int8; marginals of products."""
        rows = _rows(self.columns)
        entries: list[Entry] = []
        bounds: list[tuple[float, float]] = []
        for row in rows.values():
            entries += [(len(bounds), j, 1.0) for j in row]
            bounds.append((1.0, 1.0))
        for k, readers in enumerate(self.readers):
            z = len(self.columns) + k
            for j in readers:  # x_j <= z, and z costs nothing or more
                entries += [(len(bounds), j, 1.0), (len(bounds), z, -1.0)]
                bounds.append((-np.inf, 0.0))
        start = len(self.columns) + len(self.readers)
        for block in self.blocks:
            columns = np.arange(start, start + block.size).reshape(block.shape)
            for axis, (site, groups) in enumerate(zip(block.sites, block.groups, strict=True)):
                for group, marginal in enumerate(np.moveaxis(columns, axis, 0)):
                    own = [x for x, g in zip(rows[site], groups, strict=True) if g == group]
                    entries += [(len(bounds), x, -1.0) for x in own]
                    entries += [(len(bounds), int(y), 1.0) for y in marginal.flat]
                    bounds.append((0.0, 0.0))
            start += block.size
        return _row(entries, bounds, self.n)

    def budget_row(self, name: Constraint, budget: float) -> Row:
        """A budget as a row, scaled so that it is about 1."""
        objective = CONSTRAINTS[name][0]
        values, constant = self.coefficients[objective], self.constants[objective]
        scale = budget if budget > 0 else float(np.abs(values).max(initial=0.0)) or 1.0
        return values[None, :] / scale, -np.inf, (budget - constant) / scale


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the variables are, to lay terms over them."""

    columns: tuple[tuple[str, Level], ...]
    n_tensors: int
    blocks: tuple[Block, ...]

    def coefficients(self, own: Sequence[float], terms: Iterable[Reduced]) -> tuple[Vector, float]:
        """One coefficient a variable, and what is paid whatever is chosen.

        ``own``: the first coefficients; the others start at 0.
        """
        start = len(self.columns) + self.n_tensors
        ends = np.cumsum([start, *(block.size for block in self.blocks)]).tolist()
        total = np.zeros(ends[-1])
        total[: len(own)] = own
        rows, fixed = _rows(self.columns), 0.0
        homes = [block.sites for block in self.blocks]
        for term in terms:
            if not term.sites:
                fixed += float(term.values)
            elif len(term.sites) == 1:
                total[rows[term.sites[0]]] += term.values
            else:
                i = homes.index(home_of(homes, term))
                total[ends[i] : ends[i + 1]] += self.blocks[i].spread(term)
        return total, fixed


def _rows(columns: Sequence[tuple[str, Level]]) -> dict[str, list[int]]:
    """Site -> its columns."""
    rows: dict[str, list[int]] = {}
    for j, (site, _) in enumerate(columns):
        rows.setdefault(site, []).append(j)
    return rows


def _row(entries: Sequence[Entry], bounds: Sequence[tuple[float, float]], n: int) -> Row:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = coo_array((values, (rows, columns)), shape=(len(bounds), n)).tocsr()
    low, high = np.array(bounds, dtype=np.float64).reshape(-1, 2).T
    return matrix, low, high


def _typical(values: Vector, groups: Sequence[slice]) -> float:
    """About what a plan costs: the extremes of a width may be a thousand times that."""
    return sum(float(np.median(np.abs(values[g]))) for g in groups) or _largest(values, groups)


def _largest(values: Vector, groups: Sequence[slice]) -> float:
    """At least what any plan costs."""
    return sum(float(np.abs(values[g]).max()) for g in groups) or 1.0


def _price(problem: Problem, site: str, level: Level) -> float:
    row = problem.table.ops.get(site, {})
    return row.get(str(level), row.get(problem.table.choice.precision, 0.0))
