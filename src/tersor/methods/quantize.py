"""Number formats of weights and activations: f32, bf16, int8, and 8, 4, 3 or 2 bits for storage only.

int8: activations symmetric, one step a tensor (unsigned where the range is one-sided, shifted
where it nearly is), chosen by the error of the readers' outputs, with a smoothing scale per channel
where that helps; weights symmetric, one step an output channel, rounded with error feedback on the layer's
own statistics; the bias takes up the mean of what is left. Low bits: a float16 step for each group of
inputs, the group's size where a bit is spent best, error feedback and descent on codes and steps. Given statistics of a compressed
prefix, the weight is first refitted to the original layer's outputs. Where fewer rows reached a layer than
its covariance needs, low bits are also offered by the weights alone, in an assumed metric; where none
did, only so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import AddStatistics, MethodKind, Quantizer, SiteChange, SiteStatistics
from tersor.graph.float8_change import fits_float8, float8_change, float8_quantizer
from tersor.graph.low_bits import (
    DAMPING,
    GROUPS,
    INT8_LIMIT,
    LOW_BITS,
    LowBitConfig,
    low_bit_candidates,
    low_bit_change,
    nearest_change,
)
from tersor.graph.quantizer import column_scale, rounded, scaled
from tersor.graph.quantizer_choice import (
    SIGNED,
    UNSIGNED,
    choose_quantizer,
    expected_moments,
)
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.feedback import descend, round_with_feedback
from tersor.ops.grids import range_step, weight_steps
from tersor.ops.moments import Moments, add_moments, centred
from tersor.ops.refit import bias_shift, relative_error

_SCALE_BYTES = 4
# Rows for each input that a covariance needs (ALGORITHMS 8.2).
_ENOUGH_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Formats of one op, as a ``Method``.

    Args:
        weight_limit: Largest absolute code of int8 products. 63 where the device adds pairs of
            products in 16 bits, which saturate (the backend's probe knows).
        alphas: Smoothing exponents to choose from, beside none.
        damping: Of error feedback, relative to the mean diagonal of H.
        sweeps: Coordinate-descent sweeps after error feedback.
        groups: Inputs that share a step at low bits, to choose from; 0: all of an output.
        low_bits: Offer 4, 3 and 2 bits, which save bytes and no time.
        blends: Shares of the identity in the metric of a layer's outputs, each a further offer at low
            bits (``ops.two_sided``); empty: all outputs count alike.
        fp8: Offer 8-bit floats for linears, too. Where all backends of a run have them it is on; a plan then has int8 or
            fp8 at all linears that may be in both (``propose.eight_bits``).
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format", "addition")
    weight_limit: int = INT8_LIMIT
    alphas: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    damping: float = DAMPING
    sweeps: int = 1
    groups: tuple[int, ...] = GROUPS
    low_bits: bool = True
    blends: tuple[float, ...] = (0.4,)
    fp8: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.weight_limit <= INT8_LIMIT:
            raise ConfigError(f"weight_limit: found {self.weight_limit}, wanted 1..{INT8_LIMIT}")

    def propose(
        self, site: Site, statistics: SiteStatistics | AddStatistics
    ) -> Sequence[Candidate]:
        """All formats that the site may take; errors are measured by the caller."""
        if isinstance(statistics, AddStatistics):
            return self._of_addition(site, statistics)
        out = statistics.weight.shape[0] * statistics.weight.shape[1]
        coded = statistics.weight.numel() + _SCALE_BYTES * out
        bias = 0 if site.op_kind == "embedding" else _SCALE_BYTES * out

        def offer(level: Any, size: int, **detail: Any) -> Candidate:
            return Candidate(
                site=site.name, level=level, method="quantize", size_bytes=size, detail=detail
            )

        found = [offer("f32", site.size_bytes), offer("bf16", site.size_bytes)]
        if (
            site.op_kind != "embedding"
            and site.tensor is not None
            and statistics.high > statistics.low
        ):
            quantizer, alpha = choose_quantizer(statistics, (None, *self.alphas), self.weight_limit)
            detail = {
                "alpha": alpha,
                "step": quantizer.step,
                "grid": [quantizer.low, quantizer.high],
                "shift": quantizer.shift,
                "weight_limit": self.weight_limit,
            }
            found.append(offer("int8", coded + bias, **detail))
        if self.fp8 and fits_float8(site, statistics):
            found.append(offer("fp8", coded + bias, step=float8_quantizer(statistics).step))
        found.append(offer("int8_weight", coded + (bias if site.op_kind != "embedding" else 0)))
        if self.low_bits:
            for is_assumed in _metrics(site, statistics):
                found += low_bit_candidates(
                    site, statistics, self._low_bits(), is_assumed=is_assumed
                )
        return found

    def _of_addition(self, site: Site, statistics: AddStatistics) -> Sequence[Candidate]:
        alphas = {
            tensor: choose_quantizer(own, (None, *self.alphas), self.weight_limit)[1]
            for tensor, own in statistics.shared.items()
        }
        details: dict[Level, dict[str, Any]] = {"f32": {}, "bf16": {}, "int8": {"alphas": alphas}}
        return [
            Candidate(site=site.name, level=level, method="quantize", size_bytes=0, detail=detail)
            for level, detail in details.items()
        ]

    def apply(
        self, site: Site, candidate: Candidate, statistics: SiteStatistics | AddStatistics
    ) -> SiteChange:
        """The change for the current weight and statistics.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level in ("f32", "bf16"):
            return SiteChange(site=site, level=candidate.level)
        if isinstance(statistics, AddStatistics):
            return self._rounded_operands(site, candidate, statistics)
        if candidate.level == "int8_weight":
            return self._stored(site, statistics)
        if candidate.level in LOW_BITS:
            return low_bit_change(site, candidate, statistics, self._low_bits())
        if candidate.level == "fp8":
            return float8_change(site, statistics)
        if candidate.level == "int8":
            return self._computed(site, candidate, statistics)
        raise ConfigError(f"{site.name}: quantize has no level {candidate.level!r}")

    def _rounded_operands(
        self, site: Site, candidate: Candidate, statistics: AddStatistics
    ) -> SiteChange:
        """The operands' quantisers; those of shared tensors as their other readers have them."""
        alphas = candidate.detail.get("alphas", {})
        operands = {
            tensor: choose_quantizer(own, (alphas.get(tensor),), self.weight_limit)[0]
            for tensor, own in statistics.shared.items()
        }
        for tensor, (counts, edges) in statistics.own.items():
            signed = bool(counts[: len(counts) // 2].sum() > 0)
            low, high = SIGNED if signed else UNSIGNED
            step = range_step(counts, edges, signed=signed)
            operands[tensor] = Quantizer(step=step, low=low, high=high)
        return SiteChange(site=site, level=candidate.level, operands=operands)

    def _stored(self, site: Site, statistics: SiteStatistics) -> SiteChange:
        """Integer weight, expanded before it is used."""
        # On the original model 8 bits need no feedback; an embedding has no moments.
        if site.op_kind == "embedding" or statistics.moments_of is None:
            return nearest_change(site, statistics)
        halves = tuple(h for h in statistics.moments_of(_same, _same) if h.count)
        if not halves:
            return nearest_change(site, statistics)
        return self._round(site, statistics, halves, None, "int8_weight")

    def _low_bits(self) -> LowBitConfig:
        return LowBitConfig(
            method="quantize", groups=self.groups, damping=self.damping, blends=self.blends
        )

    def _computed(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """Integer weight and integer activations, smoothed as the candidate says."""
        alpha = candidate.detail.get("alpha")
        quantizer, _ = choose_quantizer(statistics, (alpha,), self.weight_limit)
        moments: tuple[Moments, ...]
        if statistics.moments_of is not None:
            moments = statistics.moments_of(
                lambda x: rounded(x, quantizer), lambda x: scaled(x, quantizer)
            )
        else:
            moments = (expected_moments(statistics, quantizer),)
        return self._round(site, statistics, moments, quantizer, "int8")

    def _round(
        self,
        site: Site,
        statistics: SiteStatistics,
        halves: tuple[Moments, ...],
        quantizer: Quantizer | None,
        level: Level,
    ) -> SiteChange:
        limit = INT8_LIMIT if quantizer is None else self.weight_limit
        weight = statistics.weight
        columns = column_scale(weight, quantizer)
        scaled_weight = weight if columns is None else weight * columns
        moments = reduce(add_moments, halves)
        target, damping = cross_fitted(scaled_weight, halves)
        metric, _ = centred(moments)
        step = weight_steps(target, limit, metric.diagonal(dim1=1, dim2=2))
        step = step.float().double()  # codes belong to the step that is stored
        codes = self._codes(target, step, metric, limit)
        dequantized = codes.double() * step.unsqueeze(-1)
        shift = bias_shift(scaled_weight, dequantized, moments)
        bias = shift + (0.0 if statistics.bias is None else statistics.bias)
        if quantizer is not None and quantizer.shift:
            bias = bias - dequantized.sum(2) * quantizer.shift
        return SiteChange(
            site=site,
            level=level,
            codes=codes.reshape(site.shape),
            scale=step.reshape(-1).float(),
            bias=bias.reshape(-1).float(),
            quantizer=quantizer,
            report={"refit_damping": damping},
        )

    def _codes(self, target: Tensor, step: Tensor, metric: Tensor, limit: int) -> Tensor:
        done = round_with_feedback(target, step, metric, limit=limit, damping=self.damping)
        if not self.sweeps:
            return done.codes
        return descend(target, done.codes, step, metric, limit, self.sweeps)


def _metrics(site: Site, statistics: SiteStatistics) -> tuple[bool, ...]:
    """Of low bits, whether the metric is assumed: offered beside the observed one where rows are few."""
    if site.op_kind == "embedding":
        return (False,)
    rows, inputs = statistics.moments().count, statistics.weight.shape[2]
    if not rows:
        return (True,)
    return (False,) if rows >= _ENOUGH_ROWS * inputs else (False, True)


def _same(x: Tensor) -> Tensor:
    return x


def layer_error(statistics: SiteStatistics, change: SiteChange) -> float:
    """Relative squared error of the layer's output, from moments alone (a cheap proxy)."""
    if change.codes is None or change.scale is None:
        return 0.0
    shape = statistics.weight.shape
    new = change.codes.double().reshape(shape) * change.scale.double().reshape(*shape[:2], 1)
    quantizer = change.quantizer
    moments = statistics.moments() if quantizer is None else expected_moments(statistics, quantizer)
    columns = column_scale(statistics.weight, quantizer)
    old = statistics.weight if columns is None else statistics.weight * columns
    return relative_error(old, new, moments)


__all__ = ["Quantize", "choose_quantizer", "layer_error"]
