"""Weights of which a share is zero, for storage: one bit says which, the others take 8 bits each.

Which weights go is chosen for the layer as a whole by ADMM on its own statistics (``ops.admm``), the
others are refitted on what stays, and rounded with error feedback that leaves zeros alone; the bias
takes up the mean of what is left. Given statistics of a compressed prefix, the weight is first
refitted to the original layer's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.packing import FLOAT_BITS, Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import MethodKind, SiteChange, SiteStatistics
from tersor.graph.storing import aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.admm import choose_support
from tersor.ops.low_bits import rounded_low
from tersor.ops.packed import Packed
from tersor.ops.sparsity import Unstructured, best_mask, magnitude_scores
from tersor.ops.storing import grid_of, kept_of, pack_sparse
from tersor.ops.support import refit_support

ZEROS: Mapping[Level, float] = {
    "sparse50_weight": 0.5,
    "sparse70_weight": 0.7,
    "sparse90_weight": 0.9,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify:
    """Shares of zeros of one weight, as a ``Method``.

    Args:
        bits: Of a kept weight: 2..8 on a grid with a step an output, 32 for float32.
        damping: Of the choice and of error feedback, relative to the mean diagonal of H.
        steps: Of ADMM at most.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    bits: int = 8
    damping: float = 1e-2
    steps: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 and self.bits != FLOAT_BITS:
            raise ConfigError(f"bits: found {self.bits}, wanted 2..8 or {FLOAT_BITS}")

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        """One candidate a share of zeros."""
        if not worth_packing(statistics):
            return []
        return [
            Candidate(
                site=site.name,
                level=level,
                method="sparsify",
                size_bytes=stored_bytes(site, self._packing(site, level, self.bits).size_bytes()),
                detail={"bits": self.bits},
            )
            for level in ZEROS
        ]

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The change for the current weight and statistics.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level not in ZEROS:
            raise ConfigError(f"{site.name}: sparsify has no level {candidate.level!r}")
        bits = int(candidate.detail.get("bits", self.bits))
        packing = self._packing(site, candidate.level, bits)
        aim = aim_of(site, statistics)
        packed = self._packed(packing, aim.target, aim.metric)
        return stored_change(site, candidate.level, packed, (aim, statistics))

    def _packing(self, site: Site, level: Level, bits: int) -> Packing:
        kept = kept_of(site.shape, ZEROS[level])
        return Packing(kind="sparse", shape=site.shape, bits=bits, kept=kept)

    def _packed(self, packing: Packing, target: Tensor, metric: Tensor | None) -> Packed:
        pattern = Unstructured(kept=packing.kept / target.numel())
        if metric is None:
            keep = best_mask(magnitude_scores(target), pattern)
            weight = target * keep
        else:
            chosen = choose_support(target, metric, pattern, damping=self.damping, steps=self.steps)
            keep = chosen.keep
            weight = refit_support(target, metric, keep, damping=self.damping).weight
        if packing.bits == FLOAT_BITS:
            return pack_sparse(packing, keep, weight, None)
        codes, steps = rounded_low(weight, metric, grid_of(packing), self.damping, keep)
        return pack_sparse(packing, keep, codes, steps)


__all__ = ["Sparsify"]
