"""Weights of 8, 4, 3 and 2 bits by themselves alone: no statistics of activations, no refit.

The same steps, error feedback and descent as of ``quantize``, in a metric that is assumed instead of
observed (``ops.assumed``): inputs that are independent, of the norm's own scale behind a norm, with
a common mean behind an activation. For models whose calibration samples can't be trusted to look
like what they will see. The samples still measure what every candidate costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Site
from tersor.graph.contracts import MethodKind, SiteChange, SiteStatistics
from tersor.graph.low_bits import (
    DAMPING,
    GROUPS,
    LOW_BITS,
    LowBitConfig,
    low_bit_candidates,
    low_bit_change,
    nearest_change,
)

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Datafree:
    """Stored weights that no sample decides, as a ``Method``.

    Args:
        damping: Of error feedback, relative to the mean diagonal of H.
        groups: Inputs that share a step at low bits, to choose from; 0: all of an output.
        low_bits: Offer 4, 3 and 2 bits, which save bytes and no time.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    by_name: ClassVar[bool] = True  # quantize offers it where samples are too few
    shares_levels: ClassVar[bool] = True  # with quantize
    damping: float = DAMPING
    groups: tuple[int, ...] = GROUPS
    low_bits: bool = True

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        """8 bits, and where bytes have a budget fewer."""
        out = statistics.weight.shape[0] * statistics.weight.shape[1]
        size = statistics.weight.numel() + _SCALE_BYTES * out
        bias = 0 if site.op_kind == "embedding" else _SCALE_BYTES * out
        plain = Candidate(
            site=site.name, level="int8_weight", method="datafree", size_bytes=size + bias
        )
        if not self.low_bits:
            return [plain]
        return [plain, *low_bit_candidates(site, statistics, self._config(), is_assumed=True)]

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The change for the current weight.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level == "int8_weight":
            return nearest_change(site, statistics)
        if candidate.level in LOW_BITS:
            return low_bit_change(site, candidate, statistics, self._config())
        raise ConfigError(f"{site.name}: datafree has no level {candidate.level!r}")

    def _config(self) -> LowBitConfig:
        return LowBitConfig(method="datafree", groups=self.groups, damping=self.damping)


__all__ = ["Datafree"]
