"""Weights as codes into a table of 16 or 256 values, for storage.

A uniform grid spends as many codes on the few large weights as on the many small ones; a table puts
its values where the weights are. Tables begin as exact k-means, codes come by error feedback on the
layer's own statistics, then entries and codes take turns (``ops.codebook_fit``); the bias takes up the
mean of what is left. Given statistics of a compressed prefix, the weight is first refitted to the
original layer's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersor.core.errors import ConfigError
from tersor.core.packing import Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import MethodKind, SiteChange, SiteStatistics
from tersor.graph.storing import Aim, aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.codebook_fit import fit_codebook
from tersor.ops.kmeans import EXACT_WORK
from tersor.ops.packed import Packed
from tersor.ops.storing import pack_nearest, pack_tables, scheme_of

BITS: Mapping[Level, int] = {"lut8_weight": 8, "lut4_weight": 4}
# Values times entries of a table in a first look: exact k-means would be most of its time. 16 values
# an entry hide about 1 / 16^2 of the error, and entries move from there.
DRAFT_WORK = 16**3
# A table an output costs 32 bytes for 16 values: at most this share of the codes.
TABLE_SHARE = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Tables of one weight, as a ``Method``.

    Args:
        damping: Of error feedback, relative to the mean diagonal of H.
        rounds: Of entries and codes at most, behind a compressed prefix; one for a first look. Without
            any, entries are not rounded to what stores them.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    for_size: ClassVar[bool] = True  # a plan without packed levels does not need it
    by_name: ClassVar[bool] = True  # not part of "all": a first look at a layer takes seconds
    damping: float = 1e-2
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds: found {self.rounds}, wanted at least 1")

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        """Both widths of codes; tables of an output each where they are little beside its codes."""
        if not worth_packing(statistics):
            return []
        found = []
        for level, bits in BITS.items():
            packing = Packing(kind="table", shape=site.shape, bits=bits, per_output=True)
            codes, tables = packing.parts()
            per_output = tables <= TABLE_SHARE * codes
            packing = self._packing(site, level, per_output=per_output)
            found.append(
                Candidate(
                    site=site.name,
                    level=level,
                    method="codebook",
                    size_bytes=stored_bytes(site, packing.size_bytes()),
                    detail={"per_output": per_output},
                )
            )
        return found

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The change for the current weight and statistics.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level not in BITS:
            raise ConfigError(f"{site.name}: codebook has no level {candidate.level!r}")
        per_output = bool(candidate.detail.get("per_output", False))
        packing = self._packing(site, candidate.level, per_output=per_output)
        aim = aim_of(site, statistics)
        packed = self._packed(packing, aim)
        return stored_change(site, candidate.level, packed, (aim, statistics))

    def _packing(self, site: Site, level: Level, *, per_output: bool) -> Packing:
        return Packing(kind="table", shape=site.shape, bits=BITS[level], per_output=per_output)

    def _packed(self, packing: Packing, aim: Aim) -> Packed:
        if aim.metric is None:
            return pack_nearest(aim.target, packing)
        fit = fit_codebook(
            aim.target,
            aim.metric,
            scheme_of(packing),
            rounds=1 if aim.is_draft else self.rounds,
            damping=self.damping,
            exact_work=DRAFT_WORK if aim.is_draft else EXACT_WORK,
        )
        return pack_tables(packing, fit.codebook)


__all__ = ["Codebook"]
