"""One allocation problem: candidates, one price table and budgets; and what a plan costs in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Format, PriceTable

Objective = Literal["latency", "error", "size"]
Constraint = Literal["latency", "size", "drop"]

# The constraint that bounds what an objective minimises, and the field that holds its budget.
CONSTRAINTS: dict[Constraint, tuple[Objective, str]] = {
    "latency": ("latency", "max_ms"),
    "size": ("size", "max_bytes"),
    "drop": ("error", "max_error"),
}


class Totals(NamedTuple):
    """What a plan costs: milliseconds, bytes, and the sum of its candidates' errors."""

    ms: float
    size_bytes: int
    error: float

    def of(self, objective: Objective) -> float:
        """The quantity that an objective minimises."""
        return {"latency": self.ms, "size": float(self.size_bytes), "error": self.error}[objective]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Pick one level for each site: minimise one quantity under budgets on the others.

    Sites without candidates (pinned ones) stay in the choice's precision: their time comes from
    the table, their bytes are part of ``fixed_bytes``.

    Raises:
        ConfigError: A site has no candidate in the precision of the build, or a quantiser has a
            negative price.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    table: PriceTable
    tensors: Mapping[str, str]  # site -> the tensor that it reads
    fixed_bytes: int = 0  # of everything that is no site
    objective: Objective = "latency"
    max_ms: float | None = None
    max_bytes: float | None = None
    max_error: float | None = None
    _levels: Mapping[str, Mapping[Format, Candidate]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        native = self.native
        for tensor, ms in self.table.quantizers.items():
            if not ms >= 0:
                raise ConfigError(f"quantizer of {tensor}: found a price of {ms} ms, wanted >= 0")
        for site, levels in self.candidates.items():
            if all(c.level != native for c in levels):
                found = sorted({c.level for c in levels})
                raise ConfigError(
                    f"site {site}: found candidates {found}, wanted one in {native}, the precision "
                    f"of {self.table.choice.describe()}; a site that has no choice is left out and "
                    "its bytes are counted in fixed_bytes"
                )
        object.__setattr__(self, "_levels", self._usable_levels())

    @property
    def native(self) -> Format:
        """The format of every site that is left alone."""
        return self.table.choice.precision

    def levels(self) -> Mapping[str, Mapping[Format, Candidate]]:
        """What each site may choose, in a fixed order, the native level first.

        A level needs a measured price: one that the table never saw is left out. Of several
        candidates at one level the one with the least error counts, then the smallest.
        """
        return self._levels

    def _usable_levels(self) -> dict[str, dict[Format, Candidate]]:
        found: dict[str, dict[Format, Candidate]] = {}
        for site in sorted(self.candidates):
            usable = [c for c in self.candidates[site] if self._is_usable(site, c.level)]
            usable.sort(key=lambda c: (c.level != self.native, c.level, c.error, c.size_bytes))
            row: dict[Format, Candidate] = {}
            for candidate in usable:
                row.setdefault(candidate.level, candidate)
            found[site] = row
        return found

    def _is_usable(self, site: str, level: Format) -> bool:
        if level == self.native:
            return True
        return level.startswith("int8") and level in self.table.ops.get(site, {})

    def budget(self, name: Constraint) -> float | None:
        """The budget of a constraint, or None where there is none."""
        value: float | None = getattr(self, CONSTRAINTS[name][1])
        return value

    def budgets(self) -> dict[Constraint, float]:
        """The budgets that are set, by name."""
        found = {name: self.budget(name) for name in CONSTRAINTS}
        return {name: value for name, value in found.items() if value is not None}

    def without(self, *names: Constraint, objective: Objective | None = None) -> "Problem":
        """The same problem without some budgets, and perhaps for another objective."""
        return replace(
            self,
            objective=objective or self.objective,
            max_ms=None if "latency" in names else self.max_ms,
            max_bytes=None if "size" in names else self.max_bytes,
            max_error=None if "drop" in names else self.max_error,
        )

    def native_assignment(self) -> dict[str, Format]:
        """Every site left alone."""
        return dict.fromkeys(sorted(self.candidates), self.native)

    def totals(self, assignment: Mapping[str, Format]) -> Totals:
        """What an assignment costs; sites that it does not list stay native.

        Raises:
            ConfigError: The assignment asks a site for a level that it can't have.
        """
        size, error = self.fixed_bytes, 0.0
        for site, row in self._levels.items():
            level = assignment.get(site, self.native)
            if level not in row:
                raise ConfigError(f"site {site}: found level {level}, wanted one of {list(row)}")
            size += row[level].size_bytes
            error += row[level].error
        return Totals(self.table.predict_ms(assignment, self.tensors), size, error)
