"""Convolutions as chains of cheaper ones: input channels, space or both sides reduced (Tucker-2).

All forms are one: the n = u k inputs of an unfolded convolution split into u directions and k offsets,
and the weight becomes

    W'[o, u, k] = sum_r core[o, r, k] first[r, u],     core = last core_s where outputs are reduced, too.

* ``input``: u the input channels, k the whole kernel: a 1 x 1 convolution, then the kernel.
* ``height``: u = (channel, kernel row), k = kernel column: a kh x 1 convolution, then a 1 x kw one.
* ``width``: the same the other way round.
* Reduced outputs add a 1 x 1 convolution behind. Output channels alone need no more than ``lowrank``.

Given ``first`` the rest is a regression on fewer inputs, of reduced rank where outputs are reduced:
closed form. Given the rest, ``first`` solves a linear system of r u unknowns, some rows at a time.
Alternating the two never raises the damped error.

Axes: g groups, m outputs and n = u k inputs of a group, r rank, s rank of the outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.lowrank import check_rank, principal_directions
from tersor.ops.objective import Objective
from tersor.ops.refit import layer_loss

Split = Literal["input", "height", "width"]
# Unknowns of one dense system of the first factor: 32 MiB in float64, a second on one core.
SYSTEM_SIZE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitProblem:
    """An objective whose inputs are ordered as directions x offsets; see ``split_problem``."""

    objective: Objective
    split: Split
    kernel: tuple[int, ...]
    weight: Float64[Tensor, "g m u k"]  # W*
    H: Float64[Tensor, "g u k u k"]  # damped


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCurve:
    """Nested first factors, and what each rank costs once the core is fitted to it.

    ``errors`` are in the damped metric and before the first factor itself is refitted, for rank
    0 .. min(u, m k): upper bounds of what ``fit_split`` reaches, which never rise.
    """

    problem: SplitProblem
    first: Float64[Tensor, "g ranks u"]
    errors: Float64[Tensor, "g errors"]
    damping: float  # of the fit, relative, on top of the objective's


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFactors:
    """A chain of two or three convolutions as factors of the unfolded weight."""

    first: Float64[Tensor, "g r u"]
    core: Float64[Tensor, "g s r k"]
    last: Float64[Tensor, "g m s"] | None  # None: the core has all outputs, s = m
    bias: Float64[Tensor, "g m"]  # to be added to the layer's
    error: Float64[Tensor, " g"]  # without damping
    losses: tuple[float, ...]  # damped error over all groups, at the start and after each sweep
    damping: float  # largest of all systems, relative, on top of the objective's


def split_problem(objective: Objective, kernel: tuple[int, ...], split: Split) -> SplitProblem:
    """Order the inputs of an unfolded convolution as directions x offsets.

    Args:
        objective: Of the convolution, its inputs unfolded as ``moments.unfold`` does.
        kernel: Kernel size, one number a spatial dimension.
        split: What the first convolution of the chain covers; "height" and "width" need two
            dimensions.

    Raises:
        ConfigError: The split does not suit the kernel.
        ShapeError: The inputs are no multiple of the kernel's size.
    """
    inputs, size = objective.weight.shape[2], torch.Size(kernel).numel()
    if split != "input" and len(kernel) != 2:
        raise ConfigError(
            f"split {split!r} of a kernel {kernel}: found {len(kernel)} spatial dimensions, wanted 2; "
            "use split='input'"
        )
    if inputs % size:
        raise ShapeError(
            f"weight {tuple(objective.weight.shape)} [group, out, in]: {inputs} inputs are no multiple of "
            f"the {size} elements of kernel {kernel}; unfold the inputs with this kernel"
        )
    groups, outputs, _ = objective.weight.shape
    order = split_order(inputs, kernel, split).to(objective.weight.device)
    offsets = {"input": size, "height": kernel[-1], "width": kernel[0]}[split]
    sizes = (inputs // offsets, offsets)
    return SplitProblem(
        objective=objective,
        split=split,
        kernel=kernel,
        weight=objective.weight[:, :, order].reshape(groups, outputs, *sizes),
        H=objective.damped()[:, order][:, :, order].reshape(groups, *sizes, *sizes),
    )


def split_curve(problem: SplitProblem) -> SplitCurve:
    """Nested first factors and the error of every rank after an exact fit of the core.

    Directions come from the principal outputs of all offsets together, as if inputs of different
    offsets had no correlation and one covariance. The errors are exact: with the fitted core
    E(r) = E(0) - |leading r k rows of L^-1 Z H W^T|^2, Z = first x I_k and L L^T = Z H Z^T, whose
    leading rows are those of every smaller rank.

    Raises:
        NumericalError: A matrix is not finite.
    """
    groups, outputs, directions, offsets = problem.weight.shape
    metric = mean_offset(problem.H)
    unfolded = problem.weight.movedim(3, 2).reshape(groups, outputs * offsets, directions)
    first = principal_directions(unfolded, metric).mT @ unfolded
    variance = ((first @ metric) * first).sum(2)
    # What no output reads keeps its place, but must not spoil the factor below.
    size = variance.clamp(min=0).sqrt()
    first = first / torch.where(size > 0, size, 1.0).unsqueeze(2)
    products, gram = seen_through(problem, first)
    L, used = damped_cholesky(gram, 0.0)
    explained = torch.linalg.solve_triangular(L, products.mT, upper=False).square().sum(2)
    by_rank = explained.reshape(groups, -1, offsets).sum(2)
    metric_full = _flat(problem.H)
    whole = layer_loss(problem.weight.flatten(2), metric_full).unsqueeze(1)
    left = torch.cat([whole, whole - by_rank.cumsum(1)], 1)
    errors = problem.objective.floor.unsqueeze(1) + left.clamp(min=0)
    return SplitCurve(problem=problem, first=first, errors=errors.cummin(1).values, damping=used)


def fit_split(
    curve: SplitCurve, rank: int, rank_out: int | None = None, sweeps: int = 3
) -> SplitFactors:
    """Factors of one rank by alternating exact least squares, beginning at the curve.

    Args:
        curve: Of the convolution.
        rank: Channels after the first convolution, 1 .. min(u, m k).
        rank_out: Channels before a 1 x 1 convolution behind the core (Tucker-2), 1 .. min(m, r k); None: no such
            convolution.
        sweeps: Refits of the first factor, each followed by one of all others, >= 0; 2 to 3 gain nearly
            all, unless the rank is very low.

    Returns:
        Factors whose damped error no single factor can lower at the last refit of each, and the course of
        that error, which never rises.

    Raises:
        ConfigError: A rank outside its range or negative ``sweeps``.
        NumericalError: A matrix is not finite.

    Source: Kim et al. 2016, arXiv:1511.06530, section 3.1, Tucker-2; Jaderberg et al. 2014,
    arXiv:1405.3866, section 2.2, separable kernels; here in the metric of the inputs, with regressions.
    """
    problem = curve.problem
    _check(curve, rank, rank_out, sweeps)
    first = curve.first[:, :rank]
    core, last, damping = _rest(problem, first, rank_out)
    losses = [_loss(problem, first, core, last)]
    for _ in range(sweeps):
        first, used = refit_first(problem, first, _joined(core, last))
        first, spread = _orthogonal(first, mean_offset(problem.H))
        core, last, again = _rest(problem, first, rank_out)
        losses.append(_loss(problem, first, core, last))
        damping = max(damping, used, spread, again)
    weight = multiplied(problem, first, _joined(core, last))
    return SplitFactors(
        first=first,
        core=core,
        last=last,
        bias=problem.objective.bias(weight),
        error=problem.objective.error(weight),
        losses=tuple(losses),
        damping=damping,
    )


def refit_first(
    problem: SplitProblem, first: Float64[Tensor, "g r u"], core: Float64[Tensor, "g m r k"]
) -> tuple[Float64[Tensor, "g r u"], float]:
    """The best first factor for a fixed core, as many rows at a time as ``SYSTEM_SIZE`` allows.

    Args:
        problem: Of the convolution.
        first: Where to begin; read only.
        core: Stays as it is; ``last`` included.

    Returns:
        The factor, and the largest damping that a system needed. Rows solved together have no gradient
        left; several lots of rows are one sweep of block coordinate descent.

    Raises:
        NumericalError: A matrix is not finite.
    """
    groups, rank, directions = first.shape
    offsets = core.shape[3]
    first, damping = first.clone(), 0.0
    # [g, (k l), (u v)], so that one product gives the system of some rows.
    pairs = problem.H.permute(0, 2, 4, 1, 3).reshape(groups, offsets**2, directions**2)
    step = max(1, SYSTEM_SIZE // directions)
    for start in range(0, rank, step):
        lot = core[:, :, start : start + step]
        count = lot.shape[2]
        missing = (problem.weight - torch.einsum("gmrk,gru->gmuk", core, first)).flatten(2)
        gradient = (missing @ _flat(problem.H)).reshape(groups, -1, directions, offsets)
        side = torch.einsum("gmrk,gmuk->gru", lot, gradient).reshape(groups, -1, 1)
        weights = torch.einsum("gmrk,gmsl->grskl", lot, lot).reshape(groups, count**2, -1)
        system = (weights @ pairs).reshape(groups, count, count, directions, directions)
        system = system.transpose(2, 3).reshape(groups, count * directions, -1)
        L, used = damped_cholesky((system + system.mT) / 2, 0.0)
        move = torch.cholesky_solve(side, L).reshape(groups, count, directions)
        first[:, start : start + step] += move
        damping = max(damping, used)
    return first, damping


def multiplied(
    problem: SplitProblem, first: Float64[Tensor, "g r u"], core: Float64[Tensor, "g m r k"]
) -> Float64[Tensor, "g m n"]:
    """The weight that a chain stands for, inputs in the order of the objective."""
    product = torch.einsum("gmrk,gru->gmuk", core, first).flatten(2)
    order = split_order(product.shape[2], problem.kernel, problem.split).to(product.device)
    weight = torch.empty_like(product)
    weight[:, :, order] = product
    return weight


def split_order(inputs: int, kernel: tuple[int, ...], split: Split) -> Tensor:
    """Places of the inputs (channel, *kernel) in the order directions x offsets."""
    places = torch.arange(inputs).reshape(-1, *kernel)
    return (places.transpose(1, 2) if split == "width" else places).flatten()


def fit_core(
    problem: SplitProblem, first: Float64[Tensor, "g r u"]
) -> tuple[Float64[Tensor, "g m r k"], float]:
    """The best core for a fixed first factor: a regression.

    Returns:
        The core, and the damping that its system needed.

    Raises:
        NumericalError: A matrix is not finite.
    """
    core, _, used = _rest(problem, first, None)
    return core, used


def _flat(H: Float64[Tensor, "g u k u k"]) -> Float64[Tensor, "g n n"]:
    n = H.shape[1] * H.shape[2]
    return H.reshape(-1, n, n)


def mean_offset(H: Float64[Tensor, "g u k u k"]) -> Float64[Tensor, "g u u"]:
    """Covariance of the directions, mean over offsets."""
    return H.diagonal(dim1=2, dim2=4).mean(3)


def seen_through(
    problem: SplitProblem, first: Float64[Tensor, "g r u"]
) -> tuple[Float64[Tensor, "g m q"], Float64[Tensor, "g q q"]]:
    """Products of W* x with what the core sees, q = (r, k), and of that with itself."""
    groups, rank, _ = first.shape
    offsets = problem.H.shape[2]
    half = torch.einsum("gru,gukvl->grkvl", first, problem.H)
    gram = torch.einsum("grkvl,gsv->grksl", half, first).reshape(groups, rank * offsets, -1)
    products = problem.weight.flatten(2) @ half.reshape(groups, rank * offsets, -1).mT
    return products, (gram + gram.mT) / 2


def _rest(
    problem: SplitProblem, first: Float64[Tensor, "g r u"], rank_out: int | None
) -> tuple[Float64[Tensor, "g s r k"], Float64[Tensor, "g m s"] | None, float]:
    """Core and last factor for a fixed first one: least squares, then its principal outputs."""
    groups, rank, _ = first.shape
    products, gram = seen_through(problem, first)
    L, used = damped_cholesky(gram, 0.0)
    core = torch.cholesky_solve(products.mT, L).mT
    if rank_out is None:
        return core.reshape(groups, -1, rank, problem.H.shape[2]), None, used
    last = principal_directions(core, gram)[:, :, :rank_out]
    core = (last.mT @ core).reshape(groups, -1, rank, problem.H.shape[2])
    return core, last, used


def _joined(
    core: Float64[Tensor, "g s r k"], last: Float64[Tensor, "g m s"] | None
) -> Float64[Tensor, "g m r k"]:
    return core if last is None else torch.einsum("gms,gsrk->gmrk", last, core)


def _orthogonal(
    first: Float64[Tensor, "g r u"], metric: Float64[Tensor, "g u u"]
) -> tuple[Float64[Tensor, "g r u"], float]:
    """The same span with uncorrelated rows of unit variance, for the sake of the next systems."""
    L, used = damped_cholesky(first @ metric @ first.mT, 0.0)
    return torch.linalg.solve_triangular(L, first, upper=False), used


def _loss(
    problem: SplitProblem,
    first: Float64[Tensor, "g r u"],
    core: Float64[Tensor, "g s r k"],
    last: Float64[Tensor, "g m s"] | None,
) -> float:
    product = torch.einsum("gmrk,gru->gmuk", _joined(core, last), first)
    lost = layer_loss((problem.weight - product).flatten(2), _flat(problem.H))
    return float((problem.objective.floor + lost).sum())


def _check(curve: SplitCurve, rank: int, rank_out: int | None, sweeps: int) -> None:
    weight = curve.problem.objective.weight
    what = f"split {curve.problem.split!r} of weight"
    limits = [(what, rank, curve.first.shape[1])]
    if rank_out is not None:
        reachable = min(weight.shape[1], rank * curve.problem.H.shape[2])
        limits.append((f"outputs of {what}", rank_out, reachable))
    for name, value, limit in limits:
        check_rank(value, limit, name, weight)
        if value == 0:
            raise ConfigError(f"{name} {tuple(weight.shape)}: rank 0, wanted at least one channel")
    if sweeps < 0:
        raise ConfigError(f"sweeps must be >= 0, got {sweeps}; 2 or 3 are enough")
