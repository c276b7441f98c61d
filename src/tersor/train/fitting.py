"""The pair of a rank that loses the least of what a layer gives for the inputs that it has seen.

Whitened truncation (``ops.lowrank``) of the weight as it is, in the metric of the gathered inputs, with the exact
refit of the second factor; where the layer has a bias, that takes up the mean. Without one the metric is the
inputs' second moment itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tersor.core.errors import NumericalError
from tersor.graph.contracts import Factor
from tersor.graph.factors import product
from tersor.ops.factor_pairs import FactorPair, PairConfig, fit_pair, rank_errors
from tersor.ops.moments import Moments
from tersor.ops.objective import Objective, objective_of
from tersor.ops.rank_forms import Form
from tersor.train.factorable import Layer
from tersor.train.pairs import pair_modules

# Damping of the metric where rows are many or few, as of plans (ALGORITHMS 2.1).
DAMPING, DAMPING_OF_FEW, ENOUGH_ROWS = 1e-4, 1e-2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A pair for a layer.

    Attributes:
        shift: What is added to the layer's bias [outputs]; None where it has none.
        loss: Share of the outputs' variance (without a bias: mean square) that is lost.
    """

    pair: FactorPair
    modules: nn.Sequential
    shift: Tensor | None
    loss: float


def objective_for(layer: Layer, module: nn.Module, moments: Moments) -> Objective:
    """What a pair of a layer should come near to.

    Raises:
        NumericalError: The layer's weight or its inputs are not finite.
    """
    weight = module.get_parameter("weight").detach().flatten(1).double().unsqueeze(0)
    sound = torch.isfinite(weight).all() & torch.isfinite(moments.xx).all()
    if not bool(sound):
        raise NumericalError(
            f"{layer.name}: its weight or what it reads is not finite, so that it has no factors; go back to "
            "the last checkpoint, lower the learning rate, or clip gradients"
        )
    if module._parameters.get("bias") is None:  # noqa: SLF001
        moments = replace(moments, x=torch.zeros_like(moments.x))
    is_enough = moments.count >= ENOUGH_ROWS * weight.shape[2]
    return objective_of(weight, moments, DAMPING if is_enough else DAMPING_OF_FEW)


def loss_of(objective: Objective, layer: Layer, form: Form, rank: int) -> float:
    """Share of what the layer gives that a pair of this form and rank loses."""
    errors = rank_errors(objective, form, layer.kernel)
    lost = float(errors[:, min(rank, errors.shape[1] - 1)].sum())
    whole = float(objective.variance.sum())
    return max(0.0, lost) / whole if whole > 0 else 0.0


def fitted(
    layer: Layer, module: nn.Module, objective: Objective, rank: int, forms: Sequence[Form]
) -> Fitted:
    """The best pair of a rank.

    Args:
        layer: The layer.
        module: As it is; read only.
        objective: Of its inputs.
        rank: >= 1.
        forms: To choose from, by what they lose.
    """
    form = min(forms, key=lambda f: loss_of(objective, layer, f, rank))
    pair = balanced(fit_pair(objective, form, layer.kernel, rank, PairConfig()))
    modules = pair_modules(module, pair)
    whole = whole_weight(modules).flatten(1).unsqueeze(0).to(objective.weight.device)
    variance = float(objective.variance.sum())
    lost = float(objective.error(whole).sum())
    has_bias = module._parameters.get("bias") is not None  # noqa: SLF001
    return Fitted(
        pair=pair,
        modules=modules,
        shift=objective.bias(whole)[0] if has_bias else None,
        loss=max(0.0, lost) / variance if variance > 0 else 0.0,
    )


def balanced(pair: FactorPair) -> FactorPair:
    """The same product, whose factors are of the same size in every channel between them.

    A step of gradient descent then moves the product the least that it can; with all of the size in one
    factor the other one would take steps many times as large as the layer did.
    """
    rank = pair.rank
    last = pair.last.unflatten(2, (rank, -1))  # [1, m, r, k]
    sizes = pair.first.norm(dim=2), last.norm(dim=(1, 3))  # [1, r]
    is_used = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(is_used, sizes[1] / torch.where(is_used, sizes[0], 1.0), 1.0).sqrt()
    return replace(
        pair,
        first=pair.first * ratio.unsqueeze(2),
        last=(last / ratio[:, None, :, None]).flatten(2),
    )


def whole_weight(modules: nn.Sequential) -> Tensor:
    """The one weight that a pair stands for, float64."""
    return product([Factor(weight=m.get_parameter("weight").detach()) for m in modules])
