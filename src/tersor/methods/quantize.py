"""Number formats of weights and activations: f32, bf16, int8, and 8, 4, 3 or 2 bits for storage only.

int8: activations symmetric, one step a tensor (unsigned where the range is one-sided, shifted
where it nearly is), chosen by the error of the readers' outputs, with a smoothing scale per channel
where that helps; weights symmetric, one step an output channel, rounded with error feedback on the layer's
own statistics; the bias takes up the mean of what is left. Low bits: a float16 step for each group of
inputs, the group's size where a bit is spent best, error feedback and descent on codes and steps. Given statistics of a compressed
prefix, the weight is first refitted to the original layer's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.packing import Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import AddStatistics, MethodKind, Quantizer, SiteChange, SiteStatistics
from tersor.graph.quantizer import column_scale, rounded, scaled
from tersor.graph.quantizer_choice import (
    SIGNED,
    UNSIGNED,
    choose_quantizer,
    expected_moments,
)
from tersor.graph.storing import Aim, aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.feedback import descend, round_with_feedback
from tersor.ops.grids import range_step, round_nearest, weight_steps
from tersor.ops.group_rounding import RoundingConfig
from tersor.ops.low_bits import DRAFT, best_group, rounded_low
from tersor.ops.moments import Moments, add_moments, centred
from tersor.ops.refit import bias_shift, relative_error
from tersor.ops.storing import grid_of, pack_grid

INT8_LIMIT = 127
_SCALE_BYTES = 4
LOW_BITS: Mapping[Level, int] = {"int4_weight": 4, "int3_weight": 3, "int2_weight": 2}


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
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format", "addition")
    weight_limit: int = INT8_LIMIT
    alphas: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    damping: float = 1e-2
    sweeps: int = 1
    groups: tuple[int, ...] = (0, 128, 64, 32)
    low_bits: bool = True

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
        found.append(offer("int8_weight", coded + (bias if site.op_kind != "embedding" else 0)))
        if self.low_bits and worth_packing(statistics):
            aim = aim_of(site, statistics)
            for low, bits in LOW_BITS.items():
                group = best_group(aim.target, aim.metric, bits, self.groups, self.damping)
                packing = Packing(kind="grid", shape=site.shape, bits=bits, group=group)
                found.append(offer(low, stored_bytes(site, packing.size_bytes()), group=group))
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
            return self._low_bit(site, candidate, statistics)
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
        weight = statistics.weight
        if site.op_kind == "embedding":
            rows = weight[0].unsqueeze(0)  # [1, rows, width]: one step a row
            step = rows.abs().amax(2) / INT8_LIMIT
            step = torch.where(step > 0, step, 1.0)
            codes = round_nearest(rows, step, INT8_LIMIT)
            return SiteChange(
                site=site,
                level="int8_weight",
                codes=codes.reshape(site.shape),
                scale=step.reshape(-1).float(),
            )
        if statistics.moments_of is None:  # on the original model, 8 bits need no feedback
            step = weight_steps(weight, INT8_LIMIT).float().double()
            codes = round_nearest(weight, step, INT8_LIMIT)
            return SiteChange(
                site=site,
                level="int8_weight",
                codes=codes.reshape(site.shape),
                scale=step.reshape(-1).float(),
            )
        halves = statistics.moments_of(_same, _same)
        return self._round(site, statistics, halves, None, "int8_weight")

    def _low_bit(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """A weight on a grid of a few bits, expanded before it is used."""
        packing = Packing(
            kind="grid",
            shape=site.shape,
            bits=LOW_BITS[candidate.level],
            group=int(candidate.detail.get("group", 0)),
        )
        aim = aim_of(site, statistics)
        config = replace(DRAFT, damping=self.damping) if aim.is_draft else self._careful(aim)
        codes, steps = rounded_low(aim.target, aim.metric, grid_of(packing), config)
        packed = pack_grid(packing, codes, steps)
        return stored_change(site, candidate.level, packed, (aim, statistics))

    def _careful(self, aim: Aim) -> RoundingConfig:
        return replace(RoundingConfig.for_layer(*aim.target.shape[1:]), damping=self.damping)

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
