"""What methods that only store a weight share: what to approach, and the change that comes of it."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tersor.core.records import Level, Site
from tersor.graph.contracts import SiteChange, SiteStatistics
from tersor.ops.assumed import plain_moments
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.moments import Moments, add_moments, centred
from tersor.ops.packed import Packed
from tersor.ops.refit import bias_shift
from tersor.ops.storing import fits

# A smaller weight gains less than what its names take in the file.
LEAST_WEIGHTS = 1024
_BIAS_BYTES = 4


@dataclass(frozen=True, slots=True)
class Aim:
    """What a stored weight approaches.

    Attributes:
        target: [g, m, n] float64: the weight, refitted behind a compressed prefix.
        metric: Covariance of the input [g, n, n], as the bias takes up the mean; of an embedding, whose
            rows are read one by one, None: all columns count alike.
        moments: Where the bias shift comes from; None for an embedding.
        damping: Of the refit; None: there was none.
        is_draft: The original model, where every level of every site is worked out to be compared: what
            is chosen is worked out again, with more effort, behind its compressed prefix.
        is_assumed: The moments are those of an assumption, as no row counted.
    """

    target: Tensor
    metric: Tensor | None
    moments: Moments | None = None
    damping: float | None = None
    is_draft: bool = True
    is_assumed: bool = False


def worth_packing(statistics: SiteStatistics) -> bool:
    """Whether a weight is large enough, and its values fit float16 steps."""
    return statistics.weight.numel() >= LEAST_WEIGHTS and fits(statistics.weight)


def aim_of(site: Site, statistics: SiteStatistics, *, is_assumed: bool = False) -> Aim:
    """What a site's stored weight approaches, from the statistics of the prefix as it is.

    Where no row reached the layer, moments are assumed (``ops.assumed``), and the weight is not refitted;
    where only one half of the samples has rows, it is not refitted either.

    Args:
        site: The site.
        statistics: Its statistics.
        is_assumed: Whether moments are assumed whatever was seen.

    Raises:
        NumericalError: The moments are not finite or not positive semi-definite.
    """
    weight = statistics.weight
    if site.op_kind == "embedding":
        return Aim(weight, None)
    is_draft = statistics.moments_of is None
    halves = () if is_assumed else tuple(h for h in _halves(statistics) if h.count)
    if not halves:
        assumed = assumed_moments_of(statistics)
        metric = centred(assumed)[0]
        return Aim(weight, metric, assumed, is_draft=is_draft, is_assumed=True)
    target, damping = cross_fitted(weight, halves)
    moments = reduce(add_moments, halves)
    return Aim(target, centred(moments)[0], moments, damping, is_draft=is_draft)


def assumed_moments_of(statistics: SiteStatistics) -> Moments:
    """What is assumed of a layer's input; of one that nothing is said of, that all inputs are alike."""
    if statistics.assumed is not None:
        return statistics.assumed()
    return plain_moments(statistics.weight.shape[0], statistics.weight.shape[2])


def _halves(statistics: SiteStatistics) -> tuple[Moments, ...]:
    """Moments of both halves of the samples; on the original model, of all of them."""
    if statistics.moments_of is None:
        return (statistics.moments(),)
    return statistics.moments_of(_same, _same)


def stored_bytes(site: Site, packed_bytes: int) -> int:
    """Bytes of a candidate: its packed weight, and the bias that takes up the mean of its error."""
    return packed_bytes + (0 if site.op_kind == "embedding" else _BIAS_BYTES * site.shape[0])


def stored_change(
    site: Site, level: Level, packed: Packed, known: tuple[Aim, SiteStatistics]
) -> SiteChange:
    """The change to a packed weight, with the bias that it needs."""
    aim, statistics = known
    report: dict[str, Any] = {"refit_damping": aim.damping}
    if aim.is_assumed:
        report["is_assumed"] = True
    if aim.moments is None:
        return SiteChange(site=site, level=level, packed=packed, report=report)
    stored = torch.from_numpy(packed.expand()).double().reshape(statistics.weight.shape)
    shift = bias_shift(statistics.weight, stored, aim.moments)
    bias = shift + (0.0 if statistics.bias is None else statistics.bias)
    return SiteChange(
        site=site,
        level=level,
        packed=packed,
        bias=bias.reshape(-1).float(),
        report=report,
    )


def _same(x: Tensor) -> Tensor:
    return x
