"""The best weight before a ReLU, for the ReLU's output.

Where the original pre-activation z is negative, the ReLU shows nothing of it: the new one zh may be
any negative number. Least squares spends the weight on imitating z there. The loss that counts,
E(relu(zh) - relu(z))^2, lies below the convex bound

    sum_{z>0} (zh - z)^2 + sum_{z<=0} relu(zh)^2,

which majorise-minimise brings down by least squares alone: fit the target z where z > 0, else
min(zh, 0) of the fit before. The second moment of the inputs never changes, so that one Cholesky
factor serves all steps. The bound falls in every step; the loss may rise, and the best step is kept.
Where the ReLU has a ceiling (ReLU6), the same holds above it, with max(zh, ceiling).

Axes: t rows, g groups, m outputs and n inputs of a group.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.moments import CHUNK_VALUES, add_moments, centred, moments_of, output_covariance


@dataclass(frozen=True, slots=True, kw_only=True)
class RectifiedRows:
    """Some rows of the inputs of a layer and of what its ReLU should be given.

    The prediction is inputs W^T + b + offset; the offset is the other operand of an addition between
    the layer and the ReLU, as it is in the compressed model.
    """

    inputs: Float[Tensor, "t g n"]
    wanted: Float[Tensor, "t g m"]  # z: what the original ReLU was given, the operand included
    offset: Float[Tensor, "t g m"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RectifiedFit:
    """The step with the least ReLU loss, and how all steps went; step 0 is least squares."""

    weight: Float64[Tensor, "g m n"]
    bias: Float64[Tensor, "g m"]
    losses: tuple[float, ...]  # mean over rows of |relu(zh) - relu(z)|^2, summed over outputs
    bounds: tuple[float, ...]  # mean of the convex bound; with the ridge added it never rises
    step: int  # the one that is kept
    damping: float  # in use


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    """What all steps share: the normal equations but for their right side."""

    count: int
    mean: Float64[Tensor, "g n"]
    factor: Float64[Tensor, "g n n"]  # Cholesky factor of the damped covariance
    moving: Float64[
        Tensor, "g 1 n"
    ]  # 0 where an input is constant: its products are rounding noise
    prior: Float64[Tensor, "g m n"]
    pull: Float64[Tensor, "g m n"]  # prior times the covariance


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Of one pass over the rows with one weight."""

    target: Float64[Tensor, "g m"]  # sum of the next target
    products: Float64[Tensor, "g m n"]  # sum of target (input - mean)^T
    loss: float = 0.0
    bound: float = 0.0


def fit_rectified(
    rows: Callable[[], Iterable[RectifiedRows]],
    *,
    prior: Float[Tensor, "g m n"] | None = None,
    damping: float = 1e-4,
    iterations: int = 6,
    ceiling: float = math.inf,
) -> RectifiedFit:
    """Weight and bias that bring relu(inputs W^T + b + offset) close to relu(wanted).

    Args:
        rows: Gives all rows, in parts of any size; called ``iterations + 2`` times and must give the
            same rows each time.
        prior: The weight that strong damping leads to; None: zero. Read only.
        damping: Multiple of the mean diagonal of the inputs' covariance, >= 0.
        iterations: Majorise-minimise steps after least squares, >= 0; 4 to 8 are enough.
        ceiling: Where the ReLU is cut off above, > 0: 6 for ReLU6.

    Returns:
        The best step. Its loss on these rows is not above that of least squares.

    Raises:
        ConfigError: Negative ``iterations`` or damping, or a ceiling that is not positive.
        ShapeError: No rows.
        NumericalError: Inputs or wanted pre-activations are not finite.

    Source: Hunter and Lange 2004, doi:10.1198/0003130042836, majorisation; ALGORITHMS 3.2b.
    """
    if iterations < 0:
        raise ConfigError(f"iterations must be >= 0, got {iterations}; 4 to 8 are enough")
    if not ceiling > 0:
        raise ConfigError(f"ceiling must be > 0, got {ceiling}; inf for a plain ReLU")
    system, products, target, used = _system(rows(), prior, damping)
    weight, bias = _solved(system, products, target)
    fits, losses, bounds = [], [], []
    for step in range(iterations + 1):
        is_last = step == iterations
        sums = _pass(rows(), (weight, bias), None if is_last else system.mean, ceiling)
        fits.append((weight, bias))
        losses.append(sums.loss / system.count)
        bounds.append(sums.bound / system.count)
        if not is_last:
            weight, bias = _solved(system, sums.products / system.count, sums.target / system.count)
    best = min(range(len(losses)), key=losses.__getitem__)
    return RectifiedFit(
        weight=fits[best][0],
        bias=fits[best][1],
        losses=tuple(losses),
        bounds=tuple(bounds),
        step=best,
        damping=used,
    )


def _system(
    rows: Iterable[RectifiedRows], prior: Float[Tensor, "g m n"] | None, damping: float
) -> tuple[_System, Float64[Tensor, "g m n"], Float64[Tensor, "g m"], float]:
    """The system, the right side and mean target of plain least squares, and the damping in use."""
    parts = (
        moments_of(part.inputs, residual=_minus(part.wanted, part.offset))
        for part in rows
        if len(part.inputs)
    )
    moments = next(parts, None)
    if moments is None:
        raise ShapeError("found no rows to fit, wanted at least one; give calibration samples")
    moments = reduce(add_moments, parts, moments)
    assert moments.residual is not None
    assert moments.d is not None
    if not bool(moments.d.isfinite().all()):
        raise NumericalError(
            "wanted pre-activations or offset: found NaN or infinity, wanted finite values; "
            "look for samples that are not finite or overflow"
        )
    zero = torch.zeros_like(moments.residual)
    before = zero if prior is None else prior.to(torch.float64)
    covariance, mean = centred(moments)
    L, used = damped_cholesky(covariance, damping)
    moving = (covariance.diagonal(dim1=1, dim2=2) > 0).to(covariance).unsqueeze(1)
    system = _System(
        count=moments.count,
        mean=mean,
        factor=L,
        moving=moving,
        prior=before,
        pull=before @ covariance,
    )
    # With a weight of zero the wanted output W x + d is d, here the target itself.
    return system, output_covariance(zero, moments), moments.d / moments.count, used


def _minus(wanted: Tensor, offset: Tensor | None) -> Tensor:
    return wanted if offset is None else wanted.to(torch.float64) - offset


def _solved(
    system: _System, products: Float64[Tensor, "g m n"], target: Float64[Tensor, "g m"]
) -> tuple[Float64[Tensor, "g m n"], Float64[Tensor, "g m"]]:
    missing = (products - system.pull) * system.moving
    weight = system.prior + torch.cholesky_solve(missing.mT, system.factor).mT
    return weight, target - (weight @ system.mean.unsqueeze(2)).squeeze(2)


def _pass(
    rows: Iterable[RectifiedRows],
    fit: tuple[Float64[Tensor, "g m n"], Float64[Tensor, "g m"]],
    mean: Float64[Tensor, "g n"] | None,
    ceiling: float,
) -> _Sums:
    """Losses of a weight and bias, and the sums that the next ones are solved from where a mean is given."""
    weight, bias = fit
    sums = _Sums(target=torch.zeros_like(bias), products=torch.zeros_like(weight))
    for inputs, wanted, offset in (part for whole in rows for part in _parts(whole)):
        predicted = inputs @ weight.mT + bias.unsqueeze(1) + offset
        target = torch.where(wanted > 0, wanted, predicted.clamp(max=0))
        if ceiling < math.inf:
            target = torch.where(wanted < ceiling, target, predicted.clamp(min=ceiling))
        sums.bound += float((predicted - target).square().sum())
        shown = predicted.clamp(0, ceiling) - wanted.clamp(0, ceiling)
        sums.loss += float(shown.square().sum())
        if mean is None:
            continue
        target -= offset
        sums.target += target.sum(1)
        sums.products += target.mT @ (inputs - mean.unsqueeze(1))
    return sums


def _parts(rows: RectifiedRows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs [g, t, n], wanted and offset [g, t, m] in float64, few rows at a time."""
    values = max(1, rows.inputs[:1].numel(), rows.wanted[:1].numel())
    length = max(1, CHUNK_VALUES // values)
    offset = torch.zeros_like(rows.wanted[:1]).expand_as(rows.wanted)
    offset = offset if rows.offset is None else rows.offset
    for start in range(0, len(rows.inputs), length):
        part = (value[start : start + length] for value in (rows.inputs, rows.wanted, offset))
        inputs, wanted, added = (value.to(torch.float64).transpose(0, 1) for value in part)
        yield inputs, wanted, added
