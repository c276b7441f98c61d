"""Smooth activations replaced by cheaper functions: GELU and SiLU by a scaled hardswish, or by ReLU.

s(a x) / a takes the place of the function, with the factor a whose values the layer behind bears
best; that layer's weight is refitted to its original outputs on what it reads now, unless it is
changed itself: then its own method does that behind the replaced activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersor.core.errors import ConfigError
from tersor.core.formats import ACTIVATIONS
from tersor.core.records import Candidate, Site
from tersor.graph.contracts import ActivationStatistics, MethodKind, SiteChange
from tersor.ops.activations import FACTORS, best_factor, cheaper, refitted

_ROWS = 2048  # of the sample, to compare factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Functions of one activation, as a ``Method``.

    Args:
        factors: Of hardswish, to choose from; each above 0.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("activation",)
    by_name: ClassVar[bool] = True  # not part of "all": each asks for builds of its own
    factors: tuple[float, ...] = FACTORS

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0:
            raise ConfigError(f"factors: found {self.factors}, wanted some, all above 0")

    def propose(self, site: Site, statistics: ActivationStatistics) -> Sequence[Candidate]:
        """Every cheaper function; whether it is faster is measured by the caller."""
        del statistics
        return [
            Candidate(site=site.name, level=level, method="activation", size_bytes=0)
            for level in ACTIVATIONS
        ]

    def apply(
        self, site: Site, candidate: Candidate, statistics: ActivationStatistics
    ) -> SiteChange:
        """The factor, and the reader's weight for it.

        Raises:
            ConfigError: A level that this method does not have.
            NumericalError: Values that are not finite.
        """
        kind = candidate.level
        if kind not in ACTIVATIONS:
            raise ConfigError(f"{site.name}: activation has no level {kind!r}")
        before, wanted = statistics.compressed(), statistics.function(statistics.original())
        some = slice(None, None, max(1, len(before) // _ROWS))
        factor, error = best_factor(
            before[some], wanted[some], statistics.weight.float(), kind, self.factors
        )
        given = cheaper(before, kind, factor)
        weight, shift, damping = refitted(given, wanted, statistics.weight)
        bias = shift if statistics.bias is None else statistics.bias + shift
        return SiteChange(
            site=site,
            level=kind,
            factor=factor,
            weight=weight.float(),
            bias=bias.float(),
            report={"factor": factor, "error_before_refit": error, "refit_damping": damping},
        )
