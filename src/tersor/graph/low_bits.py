"""Levels of a few bits for storage: what every method that rounds to a grid offers and makes.

The metric is that of the samples, or the assumed one (``ops.assumed``), which depends on none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.packing import Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import SiteChange, SiteStatistics
from tersor.graph.storing import Aim, aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.grids import round_nearest, weight_steps
from tersor.ops.group_grids import GroupGrid, Steps
from tersor.ops.group_rounding import RoundingConfig
from tersor.ops.low_bits import DRAFT, best_group, rounded_low
from tersor.ops.storing import grid_of, pack_grid
from tersor.ops.two_sided import blended, round_two_sided

LOW_BITS: Mapping[Level, int] = {"int4_weight": 4, "int3_weight": 3, "int2_weight": 2}
INT8_LIMIT = 127
GROUPS = (0, 128, 64, 32)
DAMPING = 1e-2
# Of a candidate's detail: whether its metric is the assumed one; the identity's share in that of outputs.
ASSUMED, BLEND = "assumed", "blend"
# Weights of a layer up to which rounding on both sides takes about a second.
MOST_BLENDED = 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBitConfig:
    """How weights are rounded to a few bits.

    Args:
        method: Whose name candidates have.
        groups: Inputs that share a step, to choose from; 0: all of an output.
        damping: Of error feedback, relative to the mean diagonal of H.
        blends: Shares of the identity in the metric of the outputs, each of which is an offer beside
            the one in which all outputs count alike (``ops.two_sided``).
    """

    method: str
    groups: tuple[int, ...] = GROUPS
    damping: float = DAMPING
    blends: tuple[float, ...] = ()


def low_bit_candidates(
    site: Site, statistics: SiteStatistics, config: LowBitConfig, *, is_assumed: bool = False
) -> Sequence[Candidate]:
    """A candidate a level, and one for each blend, with the group that spends its bits best.

    Small weights have none; what is rounded by itself alone, embeddings, large layers and those whose
    gradient is not known have no blends.
    """
    if not worth_packing(statistics):
        return []
    blends = () if is_assumed else _blends(site, statistics, config)
    aim = aim_of(site, statistics, is_assumed=is_assumed)
    found = []
    for level, bits in LOW_BITS.items():
        group = best_group(aim.target, aim.metric, bits, config.groups, config.damping)
        packing = Packing(kind="grid", shape=site.shape, bits=bits, group=group)
        plain = Candidate(
            site=site.name,
            level=level,
            method=config.method,
            size_bytes=stored_bytes(site, packing.size_bytes()),
            detail={"group": group} | ({ASSUMED: True} if is_assumed else {}),
        )
        found += [plain]
        found += [replace(plain, detail={**plain.detail, BLEND: blend}) for blend in blends]
    return found


def _blends(site: Site, statistics: SiteStatistics, config: LowBitConfig) -> tuple[float, ...]:
    if site.op_kind == "embedding" or statistics.weight.numel() > MOST_BLENDED:
        return ()
    return config.blends if config.blends and _output_moment(statistics) is not None else ()


def _output_moment(statistics: SiteStatistics) -> Tensor | None:
    return None if statistics.output_moment is None else statistics.output_moment()


def low_bit_change(
    site: Site, candidate: Candidate, statistics: SiteStatistics, config: LowBitConfig
) -> SiteChange:
    """A weight on the grid of a candidate, expanded before it is used.

    Raises:
        NumericalError: The moments are not finite or not positive semi-definite.
    """
    packing = Packing(
        kind="grid",
        shape=site.shape,
        bits=LOW_BITS[candidate.level],
        group=int(candidate.detail.get("group", 0)),
    )
    aim = aim_of(site, statistics, is_assumed=bool(candidate.detail.get(ASSUMED, False)))
    careful = DRAFT if aim.is_draft else RoundingConfig.for_layer(*aim.target.shape[1:])
    effort = replace(careful, damping=config.damping)
    codes, steps = _rounded(candidate, statistics, (aim, effort), grid_of(packing))
    packed = pack_grid(packing, codes, steps)
    return stored_change(site, candidate.level, packed, (aim, statistics))


def _rounded(
    candidate: Candidate,
    statistics: SiteStatistics,
    work: tuple[Aim, RoundingConfig],
    grid: GroupGrid,
) -> tuple[Tensor, Steps]:
    """Codes and steps, in the metric of the outputs as well where the candidate says so."""
    aim, effort = work
    blend = float(candidate.detail.get(BLEND, 1.0))  # 1: all outputs count alike
    felt = _output_moment(statistics) if blend < 1 else None
    if felt is None or aim.metric is None:
        return rounded_low(aim.target, aim.metric, grid, effort)
    done = round_two_sided(aim.target, aim.metric, blended(felt, blend), grid, effort)
    return done.codes, done.steps


def nearest_change(site: Site, statistics: SiteStatistics) -> SiteChange:
    """8 bits to nearest for storage: one step an output, or a row of an embedding; no statistics."""
    weight = statistics.weight
    if site.op_kind == "embedding":
        weight = weight[0].unsqueeze(0)  # [1, rows, width]: one step a row
        step = weight.abs().amax(2) / INT8_LIMIT
        step = torch.where(step > 0, step, 1.0)
    else:
        step = weight_steps(weight, INT8_LIMIT).float().double()
    codes = round_nearest(weight, step, INT8_LIMIT)
    return SiteChange(
        site=site,
        level="int8_weight",
        codes=codes.reshape(site.shape),
        scale=step.reshape(-1).float(),
    )
