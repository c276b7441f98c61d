"""Weights of a few bits for storage: how many inputs share a step, and the rounding.

A smaller group has a better step and takes more of them. Where bits are spent well a bit more halves
the error of every weight, so that layouts of different size compare by error^2 * 4^bits, bits those of
a weight with its share of the steps (the slope of the rate-distortion curve at any rate).

Axes: g groups, m outputs and n inputs of a group.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int8
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.group_grids import (
    GroupGrid,
    Steps,
    bits_per_weight,
    dequantize,
    fit_steps,
    innovations,
    nearest_codes,
)
from tersor.ops.group_rounding import RoundingConfig, round_weight

# Errors that are to be compared, in a third of the time: 5 % more loss at 4 bits, 8 % at 2.
DRAFT = RoundingConfig(stretches=(1.0,), sweeps=1)


def best_group(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"] | None,
    bits: int,
    groups: Sequence[int],
    damping: float = 0.01,
) -> int:
    """The group that spends its bits best, by the error of rounding to nearest.

    Args:
        weight: Weight; read only.
        H: Second moment or covariance of the input, or None where all columns count alike; read only.
        bits: Of a code.
        groups: Sizes to choose from, the first one wins a tie; 0: all inputs of an output. What is not
            smaller than the inputs is the same as that.
        damping: Of the feedback that follows.

    Raises:
        ConfigError: No groups.
    """
    outputs, inputs = weight.shape[0] * weight.shape[1], weight.shape[2]
    sizes = dict.fromkeys(g if 0 < g < inputs else 0 for g in groups)
    if not sizes:
        raise ConfigError("groups: found none, wanted at least one, such as 0")
    if len(sizes) == 1:
        return int(next(iter(sizes)))
    matter = torch.ones_like(weight[:, 0]) if H is None else innovations(H, damping)
    costs: dict[int, float] = {}
    for size in sizes:
        grid = GroupGrid(bits=bits, group=size or None)
        steps = fit_steps(weight, grid, matter)
        off = weight - dequantize(nearest_codes(weight, steps, grid), steps, grid)
        error = float((off.square() * matter.unsqueeze(1)).sum())
        rate = bits_per_weight(grid, outputs, inputs)
        costs[size] = (math.log2(error) / 2 if error > 0 else -math.inf) + rate
    return min(costs, key=costs.__getitem__)


def rounded_low(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"] | None,
    grid: GroupGrid,
    config: RoundingConfig | None = None,
    keep: Bool[Tensor, "g m n"] | None = None,
) -> tuple[Int8[Tensor, "g m n"], Steps]:
    """Codes and steps with the least error of the output; to nearest where there is no H.

    Args:
        weight: Weight; read only.
        H: As for ``best_group``.
        grid: Its grid.
        config: How hard to try; None: ``RoundingConfig.for_layer``.
        keep: Where weights may differ from zero; None: everywhere.
    """
    if H is None:
        rest: Float64[Tensor, "g m n"] = weight if keep is None else weight * keep
        steps = fit_steps(rest, grid)
        return nearest_codes(rest, steps, grid), steps
    done = round_weight(weight, H, grid, config, keep)
    return done.codes, done.steps
