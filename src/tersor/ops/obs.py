"""Which units of a width to remove, in nested order, while all others make up for them exactly.

A unit (a channel, a neuron, a head) is a set of input columns of every layer that reads the width.
Removing its columns M from a weight W with second moment H costs, once the other columns have
adapted, tr(W_M (Hinv_MM)^-1 W_M^T), Hinv = H^-1. ``removal_order`` removes the cheapest unit,
adapts W, conditions Hinv on what is left, and goes on: one run gives every kept count. The weights
themselves are then taken from the least squares on the kept columns, ``refit_columns``, which the
steps equal in exact arithmetic and which carries none of their rounding.

Axes: c units, k units left, g groups, m outputs and n inputs of a group, s columns of a unit in a
group, f columns that belong to no unit, q = k s columns left, r rows that stand for the outputs,
l units that have left, h columns that are left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.elimination import (
    State,
    all_but,
    choose,
    columns_of,
    factor,
    remove_,
    scores_of,
)
from tersor.ops.kept import check_columns, check_units
from tersor.ops.refit import layer_loss

# Columns of a panel: wide enough for matrix products at full speed, narrow against the matrices.
PANEL_COLUMNS = 256
# Downdates lose digits; after this share of removals the inverse is taken anew (ALGORITHMS 11).
REBUILD_SHARE = 0.3
# An exact order reads each weight once a unit. 1e10 float64 values are a few seconds of memory traffic;
# the factorisations of 3000 columns cost as much.
EXACT_VALUES = 1e10
# Otherwise this share of the units goes at a time, chosen exactly among a pool so many times larger.
BATCH_SHARE = 0.02
POOL_FACTOR = 4
# A swap must gain more than the rounding of two sums, or two equal units would swap forever.
SWAP_MARGIN = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A layer that reads the width.

    Consumers of the same input are best given as one, with their weights stacked along m: the cost
    is that of the inputs.
    """

    weight: Float[Tensor, "g m n"]
    second_moment: Float[
        Tensor, "g n n"
    ]  # of the input, centred, positive definite: see ``damped``
    columns: Int64[Tensor, "g c s"]  # the inputs of every unit in every group; -1: none
    scale: float = 1.0  # losses are divided by it: usually the variance of the output
    output_metric: Float[Tensor, "g m m"] | None = None  # G of tr(G D H D^T); None: identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All units in order of removal: the first k of ``order`` are removed at a loss of ``loss[k-1]``."""

    order: Int64[Tensor, " c"]
    loss: Float64[
        Tensor, " c"
    ]  # after each removal, summed over consumers, in units of their scales


def removal_order(consumers: Sequence[Consumer], *, batch: int | None = None) -> Order:
    """Greedy nested order of removal, exact for any number of consumers.

    Args:
        consumers: All layers that read the width; read only.
        batch: Units removed between two looks at all scores. 1 is the greedy order. With more, the
            cheapest ``POOL_FACTOR`` times as many are candidates, and among those the order is
            greedy; the losses stay exact. None: 1 where that takes seconds, else ``BATCH_SHARE``.

    Returns:
        The order of all units and its losses. Ties go to the unit with the lower index.

    Raises:
        ConfigError: ``batch`` below 1, or a scale that is not positive.
        ShapeError: No consumer, or columns that do not fit.
        NumericalError: A second moment is not positive definite.

    Source: Kurtic et al. 2023 (ZipLM), arXiv:2302.04089, eq. 2-4; here over several consumers.
    """
    n_units = _check(consumers)
    if batch is not None and batch < 1:
        raise ConfigError(f"batch must be at least 1 unit, got {batch}; leave it out to choose")
    parts = [_arranged(consumer) for consumer in consumers]
    batch = _batch(parts, n_units) if batch is None else batch
    panel = max(1, PANEL_COLUMNS // max(1, *(part.size for part in parts)))
    take, pool = (panel, n_units) if batch == 1 else (batch, POOL_FACTOR * batch)
    alive = torch.arange(n_units, device=parts[0].H.device)
    states: list[State] = []
    n_rebuilt = n_units + 1
    order, losses = [], []
    while len(alive):
        if not states or len(alive) <= (1 - REBUILD_SHARE) * n_rebuilt:
            states, n_rebuilt = [_state(part, alive) for part in parts], len(alive)
        chosen = choose(states, min(take, len(alive)), pool)
        losses.append(torch.stack([remove_(state, chosen) for state in states]).sum(0))
        order.append(alive[chosen])
        alive = alive[all_but(chosen, len(alive))]
    return Order(order=torch.cat(order), loss=torch.cat(losses).cumsum(0))


def improve_kept(
    consumers: Sequence[Consumer], kept: Int64[Tensor, " k"], *, swaps: int = 16
) -> Int64[Tensor, " k"]:
    """Swap units in and out of a kept set while that lowers the loss.

    The removed unit that would help most comes back, then the cheapest unit leaves; it stops where
    these are the same. Each swap costs two factorisations: meant for one kept count, not for all.

    Args:
        consumers: All layers that read the width; read only.
        kept: Units that are kept; read only.
        swaps: Swaps at most, >= 0.

    Returns:
        As many units, ascending, whose loss is not above that of ``kept``.

    Raises:
        ShapeError: No consumer, or columns or units that do not fit.
        NumericalError: A second moment is not positive definite.

    Source: Meng et al. 2024 (OSSCAR), arXiv:2403.12983, local search.
    """
    n_units = _check(consumers)
    check_units(kept, n_units)
    parts = [_arranged(consumer) for consumer in consumers]
    best = kept.sort().values
    for _ in range(swaps):
        gone = all_but(best, n_units).nonzero().squeeze(1)
        if not len(gone) or not len(best):
            break
        gains = torch.stack([_gains(part, best, gone) for part in parts]).sum(0)
        trial = torch.cat([best, gone[gains.argmax()].reshape(1)]).sort().values
        costs = torch.stack([scores_of(_state(part, trial)) for part in parts]).sum(0)
        out = int(costs.argmin())
        if float(costs[out]) >= float(gains.max()) * (1 - SWAP_MARGIN):
            break
        best = trial[trial != trial[out]]
    return best


def removal_loss(consumers: Sequence[Consumer], kept: Int64[Tensor, " k"]) -> float:
    """Loss of keeping these units only, from the definition: what ``Order.loss`` says for its sets.

    Raises:
        ShapeError: No consumer, or columns or units that do not fit.
        NumericalError: A second moment is not positive definite.
    """
    n_units = _check(consumers)
    check_units(kept, n_units)
    gone = all_but(kept, n_units).nonzero().squeeze(1)
    total = 0.0
    for part in map(_arranged, consumers):
        conditional, W = _conditional(part, kept.sort().values, gone)
        total += float(layer_loss(W, conditional).sum())
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arranged:
    """A consumer with the columns of its units first, unit by unit, then those of no unit.

    A column -1 becomes an input of its own, of variance 1, that no output reads: it costs nothing.
    """

    H: Float64[Tensor, "g n n"]  # n = c s + f here
    W: Float64[Tensor, "g r n"]  # W^T W as of the weight, r = min(m, n)
    size: int  # s
    n_units: int


def _arranged(consumer: Consumer) -> _Arranged:
    H, W = consumer.second_moment.to(torch.float64), consumer.weight.to(torch.float64)
    index = torch.cat([consumer.columns.flatten(1), _free(consumer.columns, H.shape[1])], 1)
    real, at = index >= 0, index.clamp(min=0)
    groups = torch.arange(len(H), device=H.device)[:, None, None]
    H = H[groups, at.unsqueeze(2), at.unsqueeze(1)]
    H = H.mul_(real.unsqueeze(2)).mul_(real.unsqueeze(1))
    H.diagonal(dim1=1, dim2=2).add_(~real)
    if consumer.output_metric is not None:
        W = _root(consumer.output_metric.to(torch.float64)) @ W
    W = W.gather(2, at.unsqueeze(1).expand(-1, W.shape[1], -1)) * real.unsqueeze(1)
    if W.shape[1] > W.shape[2]:
        W = torch.linalg.qr(W, mode="r").R
    _, n_units, size = consumer.columns.shape
    return _Arranged(H=H, W=W / math.sqrt(consumer.scale), size=size, n_units=n_units)


def _free(columns: Int64[Tensor, "g c s"], inputs: int) -> Int64[Tensor, "g f"]:
    """Inputs of no unit, ascending, filled up with -1 to as many in every group."""
    used = columns.flatten(1)
    free = torch.ones(len(columns), inputs + 1, dtype=torch.int8, device=columns.device)
    free.scatter_(1, used.where(used >= 0, inputs), value=0)
    free = free[:, :inputs]
    order = free.argsort(dim=1, descending=True, stable=True)[:, : int(free.sum(1).amax())]
    return order.where(free.gather(1, order) > 0, -1)


def _root(G: Float64[Tensor, "g m m"]) -> Float64[Tensor, "g m m"]:
    """R with R^T R = G, for a positive semi-definite G."""
    values, vectors = torch.linalg.eigh(G)
    root: Tensor = values.clamp(min=0).sqrt().unsqueeze(2) * vectors.mT
    return root


def _batch(parts: Sequence[_Arranged], n_units: int) -> int:
    if n_units * sum(part.W.numel() for part in parts) <= EXACT_VALUES:
        return 1
    return math.ceil(BATCH_SHARE * n_units)


def _state(part: _Arranged, alive: Int64[Tensor, " k"]) -> State:
    """Inverse on what is alive, ascending, and the weight refitted to it."""
    n_left = len(alive) * part.size
    if len(alive) == part.n_units:
        H, W = part.H, part.W[:, :, :n_left]
        Hinv = torch.cholesky_inverse(factor(H))[:, :n_left, :n_left]
        return State(Hinv=Hinv, W=W, size=part.size)
    keep = _keep(part, alive)
    gone = all_but(keep, part.H.shape[1])
    rows = part.H[:, keep]
    Hinv = torch.cholesky_inverse(factor(rows[:, :, keep]))[:, :, :n_left]
    moved = (part.W[:, :, gone] @ rows[:, :, gone].mT) @ Hinv
    W = part.W[:, :, keep[:n_left]] + moved
    return State(Hinv=Hinv[:, :n_left], W=W, size=part.size)


def _keep(part: _Arranged, alive: Int64[Tensor, " k"]) -> Int64[Tensor, " h"]:
    free = torch.arange(part.n_units * part.size, part.H.shape[1], device=alive.device)
    return torch.cat([columns_of(alive, part.size), free])


def _conditional(
    part: _Arranged, kept: Int64[Tensor, " k"], gone: Int64[Tensor, " l"]
) -> tuple[Float64[Tensor, "g q q"], Float64[Tensor, "g r q"]]:
    """Second moment of the removed columns that the kept ones do not explain, and their weight."""
    keep, out = _keep(part, kept), columns_of(gone, part.size)
    L = factor(part.H[:, keep][:, :, keep])
    explained = torch.linalg.solve_triangular(L, part.H[:, keep][:, :, out], upper=False)
    return part.H[:, out][:, :, out] - explained.mT @ explained, part.W[:, :, out]


def _gains(
    part: _Arranged, kept: Int64[Tensor, " k"], gone: Int64[Tensor, " l"]
) -> Float64[Tensor, " l"]:
    """What every removed unit would take off the loss if it came back."""
    conditional, W = _conditional(part, kept, gone)
    state = State(Hinv=conditional, W=W @ conditional, size=part.size)
    return scores_of(state)


def _check(consumers: Sequence[Consumer]) -> int:
    if not consumers:
        raise ShapeError("no consumer reads this width, so that all its units are free to remove")
    counts = {consumer.columns.shape[1] for consumer in consumers}
    if len(counts) != 1 or 0 in counts:
        raise ShapeError(
            f"consumers have {sorted(counts)} units, wanted the same number >= 1; "
            "give columns of every unit to every consumer, -1 where it reads none"
        )
    for consumer in consumers:
        check_columns(consumer.columns, consumer.weight.shape[2])
        if not consumer.scale > 0:
            raise ConfigError(
                f"scale must be positive, got {consumer.scale}; 1 leaves losses alone"
            )
    return counts.pop()
