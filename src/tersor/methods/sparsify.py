"""Weights of which a share is zero, for storage: one bit says which, the others take 8 bits each, or 4.

Of the pattern 2 of 4 two of every four neighbouring inputs stay; the inputs are ordered before so that
large weights do not meet in one group.

Which weights go is chosen for the layer as a whole by ADMM on its own statistics (``ops.admm``), the
others are refitted on what stays, and rounded with error feedback that leaves zeros alone; the bias
takes up the mean of what is left. Given statistics of a compressed prefix, the weight is first
refitted to the original layer's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.packing import FLOAT_BITS, Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import MethodKind, SiteChange, SiteStatistics
from tersor.graph.storing import Aim, aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.admm import choose_support
from tersor.ops.group_rounding import RoundingConfig
from tersor.ops.low_bits import DRAFT, rounded_low
from tersor.ops.packed import Packed
from tersor.ops.permutation import permute_inputs
from tersor.ops.remembered import remembered
from tersor.ops.sparsity import (
    NofM,
    Pattern,
    Unstructured,
    best_mask,
    eliminate,
    magnitude_scores,
    obs_scores,
)
from tersor.ops.storing import grid_of, kept_of, pack_nearest, pack_pairs, pack_sparse
from tersor.ops.support import refit_support


@dataclass(frozen=True, slots=True)
class Zeros:
    """What a level leaves out, and its bits for the rest.

    Attributes:
        share: Of zeros.
        bits: Of a kept weight; None: as the method is set.
        in_fours: Whether every four neighbouring inputs keep two.
    """

    share: float
    bits: int | None = None
    in_fours: bool = False


ZEROS: Mapping[Level, Zeros] = {
    "sparse50_weight": Zeros(0.5),
    "sparse70_weight": Zeros(0.7),
    "sparse90_weight": Zeros(0.9),
    "sparse50_int4_weight": Zeros(0.5, bits=4),
    "sparse2of4_weight": Zeros(0.5, in_fours=True),
    "sparse2of4_int4_weight": Zeros(0.5, bits=4, in_fours=True),
}
_FOURS = NofM(kept=2, of=4)
# Of pairings for an order of the inputs: on layers of MiniLM 32 lower the loss by 1 to 3 % more.
_ROUNDS = 4
# Of the refit's gradient; the loss is then within 1e-3 of its least one, and rounding follows.
REFIT_TOLERANCE = 1e-3
DRAFT_TOLERANCE = 2e-3  # the loss is within 1 % of that


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify:
    """Shares of zeros of one weight, as a ``Method``.

    Args:
        bits: Of a kept weight, where its level has none: 2..8 on a grid with a step an output, 32 for
            float32.
        damping: Of the choice and of error feedback, relative to the mean diagonal of H.
        steps: Of ADMM at most.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    for_size: ClassVar[bool] = True  # a plan without packed levels does not need it
    by_name: ClassVar[bool] = True  # not part of "all": a first look at a layer takes seconds
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
        found = []
        for level, zeros in ZEROS.items():
            bits = zeros.bits or self.bits
            size = stored_bytes(site, self._packing(site, level, bits).size_bytes())
            found.append(
                Candidate(
                    site=site.name,
                    level=level,
                    method="sparsify",
                    size_bytes=size,
                    detail={"bits": bits},
                )
            )
        return found

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The change for the current weight and statistics.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level not in ZEROS:
            raise ConfigError(f"{site.name}: sparsify has no level {candidate.level!r}")
        bits = int(candidate.detail.get("bits", ZEROS[candidate.level].bits or self.bits))
        packing = self._packing(site, candidate.level, bits)
        aim = aim_of(site, statistics)
        packed = self._packed(packing, aim)
        return stored_change(site, candidate.level, packed, (aim, statistics))

    def _packing(self, site: Site, level: Level, bits: int) -> Packing:
        zeros = ZEROS[level]
        if zeros.in_fours:
            return Packing(kind="pairs", shape=site.shape, bits=bits)
        return Packing(
            kind="sparse", shape=site.shape, bits=bits, kept=kept_of(site.shape, zeros.share)
        )

    def _packed(self, packing: Packing, aim: Aim) -> Packed:
        if aim.metric is None:
            return pack_nearest(aim.target, packing)
        pattern: Pattern = _FOURS
        if packing.kind == "sparse":
            pattern = Unstructured(kept=packing.kept / aim.target.numel())
        effort = _Effort(aim.is_draft, self.damping, self.steps)
        order, keep, weight = _kept(aim.target, aim.metric, pattern, effort)
        codes, steps = weight, None
        if packing.bits != FLOAT_BITS:
            config = DRAFT if aim.is_draft else RoundingConfig.for_layer(*weight.shape[1:])
            config = replace(config, damping=self.damping)
            codes, steps = rounded_low(weight, aim.metric, grid_of(packing), config, keep)
        if packing.kind == "pairs":
            return pack_pairs(packing, order, keep, codes, steps)
        return pack_sparse(packing, keep, codes, steps)


@dataclass(frozen=True, slots=True)
class _Effort:
    """How hard to try: in one pass over the columns, or at leisure by so many steps."""

    is_draft: bool
    damping: float
    steps: int


@remembered  # levels that differ in bits alone keep the same
def _kept(
    weight: Tensor, metric: Tensor, pattern: Pattern, effort: _Effort
) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the inputs, which weights [g, m, n] stay, and what they are."""
    order = _order(weight, metric, pattern, effort.damping)
    target, moment = _arranged(weight, metric, order, pattern)
    start: Tensor | None = None
    if effort.is_draft:
        done = eliminate(target, moment, pattern, damping=effort.damping)
        # It keeps a share of every block of columns, whose sum may be a few weights off.
        keep, start = best_mask(magnitude_scores(done.weight), pattern), done.weight
    else:
        keep = choose_support(
            target, moment, pattern, damping=effort.damping, steps=effort.steps
        ).keep
    refitted = refit_support(
        target,
        moment,
        keep,
        damping=effort.damping,
        direct=False,  # one factorisation an output takes ten times as long
        tolerance=DRAFT_TOLERANCE if effort.is_draft else REFIT_TOLERANCE,
        start=start,
    ).weight
    back = order.argsort()
    return order, keep[:, :, back], refitted[:, :, back]


def _order(target: Tensor, metric: Tensor, pattern: Pattern, damping: float) -> Tensor:
    """The order of the inputs in which the pattern keeps most, where there is one."""
    inputs = target.shape[2]
    if not isinstance(pattern, NofM) or inputs % pattern.of:
        return torch.arange(inputs)
    scores = obs_scores(target, metric, damping).flatten(0, 1)
    return permute_inputs(scores, pattern, rounds=_ROUNDS)


def _arranged(
    weight: Tensor, metric: Tensor, order: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """A weight and its metric in an order of the inputs, with idle ones behind to fill the last group."""
    W, H = weight, metric
    if not torch.equal(order, torch.arange(len(order))):
        W, H = weight[:, :, order], metric[:, order][:, :, order]
    missing = -W.shape[2] % pattern.of if isinstance(pattern, NofM) else 0
    if not missing:
        return W, H
    inputs, scale = W.shape[2], H.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    W = torch.nn.functional.pad(W, [0, missing])
    H = torch.nn.functional.pad(H, [0, missing, 0, missing])
    H.diagonal(dim1=1, dim2=2)[:, inputs:] = scale
    return W, H


__all__ = ["Sparsify"]
