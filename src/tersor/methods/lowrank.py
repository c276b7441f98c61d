"""Low rank: a layer as two thinner ones, the best pair for its outputs, in floats or in int8.

The factors come in closed form from the layer's own input statistics (``ops.lowrank``; convolutions
also as a kh x 1 and a 1 x kw one, ``ops.split_kernels``). Given statistics of a compressed prefix the
weight is first refitted to the original outputs, then factorised in the metric of the inputs that the
layer really sees. In int8 it is rounded after that: the first factor with error feedback, the second
refitted to it as rounded, and to a sample of what passes between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.rank_levels import RankLevel, is_eight_bit, rank_of
from tersor.core.records import Candidate, Site
from tersor.graph.contracts import Factor, MethodKind, Quantizer, SiteChange, SiteStatistics
from tersor.graph.factors import product
from tersor.graph.operators import Window
from tersor.graph.quantizer import column_scale, rounded, scaled
from tersor.graph.quantizer_choice import SIGNED, choose_quantizer, expected_moments
from tersor.observe.streams import Histogram
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.factor_costs import LayerSizes
from tersor.ops.factor_pairs import FactorPair, PairConfig, best_form, fit_pair, round_pair
from tersor.ops.grids import INT8_LIMIT, range_step
from tersor.ops.moments import Moments, add_moments, centred
from tersor.ops.objective import Objective, objective_of
from tersor.ops.rank_forms import as_form, factor_shapes, forms_of, offered_ranks, rank_limit
from tersor.ops.refit import bias_shift, relative_error

NATIVE = ("f32", "bf16")
_FLOAT_BYTES = 4
# Damping of the metric, relative to its mean diagonal (ALGORITHMS 2.1), where rows are many or few.
DAMPING, DAMPING_OF_FEW, ENOUGH_ROWS = 1e-4, 1e-2, 4


def sixteen(site: Site) -> int:
    """A tile where no device says which one it likes."""
    del site
    return 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowrank:
    """Ranks of one linear layer or ungrouped convolution, as a ``Method``.

    Args:
        rank_step: Site -> channels in a tile of the device: ranks are multiples.
        most: Ranks of a site at most.
        weight_limit: Largest absolute code of int8 products.
        alphas: Smoothing exponents of int8 inputs to choose from, beside none; those of quantize, as
            all readers of a tensor must find the same quantiser.
        config: How factors are fitted and rounded.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    gives_ranks: ClassVar[bool] = True  # a plan without rank levels does not need it
    by_name: ClassVar[bool] = True  # not part of "all": it makes prices and plans take longer
    rank_step: Callable[[Site], int] = sixteen
    most: int = 4
    weight_limit: int = INT8_LIMIT
    alphas: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    config: PairConfig = field(default_factory=PairConfig)

    def __post_init__(self) -> None:
        if self.most < 1 or not 1 <= self.weight_limit <= INT8_LIMIT:
            raise ConfigError(
                f"lowrank: found most={self.most} and weight_limit={self.weight_limit}, wanted at "
                f"least 1 and 1..{INT8_LIMIT}"
            )

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        """The layer as it is, and ranks below break-even in its one best form."""

        def offer(level: Any, size: int, **detail: Any) -> Candidate:
            return Candidate(
                site=site.name, level=level, method="lowrank", size_bytes=size, detail=detail
            )

        found = [offer(level, site.size_bytes) for level in NATIVE]
        if not _is_factorable(site, statistics.window) or not statistics.moments().count:
            return found
        layer, window = _layer(site, statistics.window), statistics.window
        kernel = () if window is None else window.kernel
        form = best_form(_objective(statistics.weight, statistics.moments()), layer, kernel)
        if form is None:
            return found
        limit = rank_limit(layer, form)
        width = site.size_bytes // statistics.weight.numel()
        has_int8 = site.tensor is not None and statistics.high > statistics.low
        alpha = None
        if has_int8:
            alpha = choose_quantizer(statistics, (None, *self.alphas), self.weight_limit)[1]
        for rank in offered_ranks(limit, self.rank_step(site), self.most):
            shapes = factor_shapes(layer, form, rank)
            elements, outputs = sum(a * b for a, b in shapes), layer.outputs
            whole = width * (elements + outputs)
            found.append(offer(RankLevel.of("f32", rank), whole, form=form))
            if has_int8:
                # A step an output of both, and a bias of both where the first one is centred.
                rows = 2 * outputs + rank * (2 if form == "output" else 1)
                size = elements + _FLOAT_BYTES * rows
                found.append(offer(RankLevel.of("int8", rank), size, form=form, alpha=alpha))
        return found

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The factors for the current weight and statistics.

        A rank above what is left of a layer whose widths were cut is that.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level in NATIVE:
            return SiteChange(site=site, level=candidate.level)
        rank = rank_of(candidate.level)
        if not rank or not _is_factorable(site, statistics.window):
            raise ConfigError(f"{site.name}: lowrank has no level {candidate.level!r} here")
        form = as_form(candidate.detail.get("form", forms_of(_kernel(statistics.window))[0]))
        seen = self._seen(candidate, statistics)
        objective = _objective(seen.target, seen.moments)
        # A candidate is judged by factors in closed form; those of a plan are refined.
        sweeps = 0 if statistics.moments_of is None else self.config.sweeps
        config = replace(self.config, sweeps=sweeps)
        pair = fit_pair(objective, form, _kernel(statistics.window), rank, config)
        factors, centre = _floats(pair), torch.zeros(1, dtype=torch.float64)
        if seen.quantizer is not None:
            factors, centre = self._rounded(pair, objective, seen, statistics)
        factors = _in_place(factors, pair, statistics.window)
        whole = product(factors).reshape(statistics.weight.shape)
        bias = bias_shift(seen.weight, whole, seen.moments) + centre
        bias = bias if statistics.bias is None else bias + statistics.bias
        return SiteChange(
            site=site,
            level=candidate.level,
            bias=bias.reshape(-1).float(),
            quantizer=seen.quantizer,
            factors=factors,
            report={
                "form": form,
                "rank": pair.rank,
                "refit_damping": seen.refit_damping,
                "loss": relative_error(seen.weight, whole, seen.moments),
            },
        )

    def _seen(self, candidate: Candidate, statistics: SiteStatistics) -> "_Seen":
        """The layer's problem on what it really reads."""
        quantizer: Quantizer | None = None
        if is_eight_bit(candidate.level):
            alpha = candidate.detail.get("alpha")
            quantizer, _ = choose_quantizer(statistics, (alpha,), self.weight_limit)
        columns = column_scale(statistics.weight, quantizer)
        weight = statistics.weight if columns is None else statistics.weight * columns
        halves: tuple[Moments, ...]
        if statistics.moments_of is not None:
            q = quantizer
            halves = (
                statistics.moments_of(_same, _same)
                if q is None
                else statistics.moments_of(lambda x: rounded(x, q), lambda x: scaled(x, q))
            )
        elif quantizer is not None:
            halves = (expected_moments(statistics, quantizer),)
        else:
            halves = (statistics.moments(),)
        target, damping = cross_fitted(weight, halves)
        return _Seen(weight, target, reduce(add_moments, halves), quantizer, damping)

    def _rounded(
        self, pair: FactorPair, objective: Objective, seen: "_Seen", statistics: SiteStatistics
    ) -> tuple[tuple[Factor, ...], Tensor]:
        """Both factors as codes, and what the last one's bias must add for a centred first one."""
        quantizer = seen.quantizer
        assert quantizer is not None
        is_centred = pair.form == "output"  # what follows has no window, so adds no zeros
        mean = centred(seen.moments)[1]
        between = pair.between(_seen_rows(statistics, quantizer))
        if is_centred:
            between = between - pair.first[0] @ mean[0]
        histogram = Histogram()
        histogram.add_(between)
        step = range_step(histogram.counts, histogram.edges(), signed=True)
        first, last = round_pair(pair, objective, step, limit=self.weight_limit, config=self.config)
        offset = None
        if is_centred:
            offset = -(first.dense() @ (mean[0] + quantizer.shift))
        elif quantizer.shift:  # no kernel is padded
            offset = -first.dense().sum(1) * quantizer.shift
        factors = (
            Factor(
                codes=first.codes,
                scale=first.step,
                bias=None if offset is None else offset.float(),
            ),
            Factor(
                codes=last.codes,
                scale=last.step,
                quantizer=Quantizer(
                    step=step, low=SIGNED[0], high=SIGNED[1], channel_dim=statistics.channel_dim
                ),
            ),
        )
        centre = torch.zeros(1, dtype=torch.float64)
        if is_centred:
            centre = (last.dense() @ (first.dense() @ mean[0])).unsqueeze(0)
        return factors, centre


@dataclass(frozen=True, slots=True)
class _Seen:
    """A layer's problem in the units of what it reads.

    Attributes:
        weight: Of the original [1, m, n]; its columns undo the quantiser's channel scale.
        target: The same, refitted where the prefix has changed.
        moments: Of what is read, without the quantiser's shift.
        quantizer: In int8.
        refit_damping: How the target was fitted; None: it was not.
    """

    weight: Tensor
    target: Tensor
    moments: Moments
    quantizer: Quantizer | None
    refit_damping: float | None


def _same(x: Tensor) -> Tensor:
    return x


def _kernel(window: Window | None) -> tuple[int, ...]:
    return () if window is None else window.kernel


def _is_factorable(site: Site, window: Window | None) -> bool:
    """One op, one group, and paddings that two convolutions can share."""
    is_even = window is None or all(before == after for before, after in window.padding)
    return (
        site.op_kind in ("linear", "conv") and len(site.ops) == 1 and site.groups == 1 and is_even
    )


def _layer(site: Site, window: Window | None) -> LayerSizes:
    """Sizes; a convolution reads as many positions for each that it writes as its stride says."""
    if window is None:
        return LayerSizes(outputs=site.shape[0], inputs=site.shape[1])
    return LayerSizes(
        outputs=site.shape[0],
        inputs=site.shape[1],
        kernel=window.kernel,
        positions_in=window.stride,
        positions_out=(1,) * len(window.kernel),
    )


def _objective(target: Tensor, moments: Moments) -> Objective:
    """Of a weight that has been refitted already, in the metric of what the layer reads."""
    plain = Moments(count=moments.count, xx=moments.xx, x=moments.x)
    is_enough = moments.count >= ENOUGH_ROWS * target.shape[2]
    return objective_of(target, plain, DAMPING if is_enough else DAMPING_OF_FEW)


def _seen_rows(statistics: SiteStatistics, quantizer: Quantizer) -> Tensor:
    """A sample of what the op reads [t, n], through the quantiser, without its shift."""
    rows = statistics.rows().compressed.double()[:, 0]
    scale = quantizer.inverse_scale
    if scale is None:
        return rounded(rows, quantizer)
    factor = scale.double().repeat_interleave(rows.shape[1] // scale.numel())
    return rounded(rows * factor, replace(quantizer, inverse_scale=None))


def _floats(pair: FactorPair) -> tuple[Factor, ...]:
    return Factor(weight=pair.first[0].float()), Factor(weight=pair.last[0].float())


def _in_place(
    factors: tuple[Factor, ...], pair: FactorPair, window: Window | None
) -> tuple[Factor, ...]:
    """The factors in the layout of their ops."""
    if window is None:
        return factors
    steps = pair.steps(window.stride, [p for p, _ in window.padding], window.dilation)
    found = []
    for factor, (shape, own) in zip(factors, steps, strict=True):
        padding = tuple((p, p) for p in own.padding)
        found.append(
            replace(
                factor,
                weight=None if factor.weight is None else factor.weight.reshape(shape),
                codes=None if factor.codes is None else factor.codes.reshape(shape),
                window=Window(own.kernel, own.stride, padding, own.dilation, 1),
            )
        )
    return tuple(found)
