"""Two factors of a layer in any form: fitted in closed form, and rounded to integers after that.

Forms are those of ``rank_forms``. All are one: a first factor [r, u] is applied at k offsets of the n = u k
inputs, and the last one [m, r k] reads what it gives. Of the output form k is 1.

Axes: one group, m outputs, n inputs, u directions, k offsets, r rank, t rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int8
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.chains import Geometry
from tersor.ops.factor_costs import LayerSizes
from tersor.ops.feedback import descend, round_with_feedback
from tersor.ops.grids import weight_steps
from tersor.ops.lowrank import factors, rank_curve, refit_left
from tersor.ops.objective import Objective
from tersor.ops.rank_forms import Form, forms_of, rank_limit
from tersor.ops.split_kernels import (
    Split,
    SplitProblem,
    fit_core,
    fit_split,
    mean_offset,
    seen_through,
    split_curve,
    split_order,
    split_problem,
)

_SPLITS: dict[Form, Split] = {"input": "input", "height": "height", "width": "width"}
_AXES: dict[Form, tuple[int, ...]] = {"input": (), "height": (0,), "width": (1,)}
# The share of the dense layer's cost at which forms are compared: about where ranks begin to pay.
COMPARED_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """How factors are fitted and rounded.

    Args:
        sweeps: Alternating refits of a split kernel.
        damping: Of error feedback, relative to the mean diagonal of the metric.
        descents: Sweeps of coordinate descent after error feedback.
    """

    sweeps: int = 2
    damping: float = 1e-2
    descents: int = 1

    def __post_init__(self) -> None:
        if min(self.sweeps, self.descents) < 0 or not self.damping >= 0:
            raise ConfigError(
                f"pair: found sweeps={self.sweeps}, damping={self.damping} and "
                f"descents={self.descents}, wanted none below 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorPair:
    """What passes between the factors has about unit variance in every channel."""

    form: Form
    kernel: tuple[int, ...]
    first: Float64[Tensor, "1 r u"]
    last: Float64[Tensor, "1 m q"]  # q = r k

    @property
    def rank(self) -> int:
        """Channels between the factors."""
        return self.first.shape[1]

    def between(self, rows: Float[Tensor, "t n"]) -> Float64[Tensor, "..."]:
        """What the first factor gives for rows of the unfolded input, at every offset [..., r]."""
        return self.columns(rows.double().mT).movedim(0, -1) @ self.first[0].mT

    def columns(self, values: Float[Tensor, "n ..."]) -> Float64[Tensor, "u ..."]:
        """Values of the unfolded inputs as the first factor reads them [u, ..., k]; of k = 1 [u, ...]."""
        u = self.first.shape[2]
        if self.form == "output":
            return values
        order = split_order(len(values), self.kernel, _SPLITS[self.form]).to(values.device)
        return values[order].reshape(u, -1, *values.shape[1:]).movedim(1, -1)

    def steps(
        self, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> tuple[tuple[tuple[int, ...], Geometry], ...]:
        """Of a convolution: the layout of each factor, and how it moves over its input."""
        whole = Geometry(
            kernel=self.kernel,
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
        )
        every = tuple(range(len(self.kernel)))
        axes = _AXES.get(self.form, every)
        ours, rest = whole.along(axes), whole.along(tuple(a for a in every if a not in axes))
        outputs = self.last.shape[1]
        return (
            ((self.rank, -1, *ours.kernel), ours),
            ((outputs, self.rank, *rest.kernel), rest),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """One factor on a grid of a step a row."""

    codes: Int8[Tensor, "a b"]
    step: Float[Tensor, " a"]

    def dense(self) -> Float64[Tensor, "a b"]:
        """The factor as it is multiplied."""
        return self.codes.double() * self.step.double().unsqueeze(1)


def best_form(objective: Objective, layer: LayerSizes, kernel: tuple[int, ...]) -> Form | None:
    """The form with the least error at half of the layer's cost; None where no rank costs less."""
    errors: dict[Form, float] = {}
    for form in forms_of(kernel):
        rank = rank_limit(layer, form, COMPARED_SHARE)
        if rank < 1:
            continue
        curve = rank_errors(objective, form, kernel)
        errors[form] = float(curve[:, min(rank, curve.shape[1] - 1)].sum())
    best = min(errors.items(), key=lambda pair: pair[1], default=None)
    return None if best is None else best[0]


def rank_errors(
    objective: Objective, form: Form, kernel: tuple[int, ...]
) -> Float64[Tensor, "1 ranks"]:
    """Error of the layer's outputs at every rank from 0, before alternating refits of a split kernel."""
    if form == "output":
        return rank_curve(objective).errors
    return split_curve(split_problem(objective, kernel, _SPLITS[form])).errors


def fit_pair(
    objective: Objective, form: Form, kernel: tuple[int, ...], rank: int, config: PairConfig
) -> FactorPair:
    """The best factors of one form and rank, or of full rank where that is less.

    Args:
        objective: Of the layer, of one group.
        form: One of the kernel's.
        kernel: Kernel size; empty for a linear layer.
        rank: >= 1.
        config: How.

    Raises:
        NumericalError: A matrix is not finite.
    """
    if form == "output":
        curve = rank_curve(objective)
        found = factors(curve, min(rank, curve.basis.shape[2]), "white")
        return FactorPair(form=form, kernel=kernel, first=found.right, last=found.left)
    curves = split_curve(split_problem(objective, kernel, _SPLITS[form]))
    split = fit_split(curves, min(rank, curves.first.shape[1]), sweeps=config.sweeps)
    return FactorPair(form=form, kernel=kernel, first=split.first, last=split.core.flatten(2))


def round_pair(
    pair: FactorPair, objective: Objective, step: float, *, limit: int, config: PairConfig
) -> tuple[Codes, Codes]:
    """Both factors as integers, the last one refitted to the first as rounded.

    Args:
        pair: Factors to begin with.
        objective: Of the layer, of what it reads rounded.
        step: Of what passes between them, whose rounding is noise in the metric of the last one.
        limit: Largest code.
        config: How.

    Raises:
        NumericalError: A matrix is not finite.
    """
    metric = objective.damped()
    problem: SplitProblem | None = None
    if pair.form != "output":
        problem = split_problem(objective, pair.kernel, _SPLITS[pair.form])
        metric = mean_offset(problem.H)
    first = _round(pair.first, metric, limit, config)
    right = first.dense().unsqueeze(0)
    if problem is None:
        last, _ = refit_left(objective, pair.last, right)
        seen = right @ metric @ right.mT
    else:
        core, _ = fit_core(problem, right)
        last, (_, seen) = core.flatten(2), seen_through(problem, right)
    noise = torch.eye(seen.shape[1], dtype=torch.float64, device=seen.device) * (step**2 / 12)
    return first, _round(last, seen + noise, limit, config)


def _round(
    factor: Float64[Tensor, "1 a b"],
    metric: Float64[Tensor, "1 b b"],
    limit: int,
    config: PairConfig,
) -> Codes:
    steps = weight_steps(factor, limit, metric.diagonal(dim1=1, dim2=2)).float().double()
    codes = round_with_feedback(factor, steps, metric, limit=limit, damping=config.damping).codes
    codes = descend(factor, codes, steps, metric, limit, config.descents)
    return Codes(codes=codes[0], step=steps[0].float())
