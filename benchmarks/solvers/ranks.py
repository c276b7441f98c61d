"""Two factors in a weight's place, at equal parameters."""

from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.solvers.cells import Setting
from benchmarks.solvers.layers import Layer, Subject
from benchmarks.solvers.peers import REFERENCE
from benchmarks.solvers.rows import Recorder, Row
from tersor.ops.damping import damped_cholesky
from tersor.ops.factor_costs import LayerSizes
from tersor.ops.lowrank import factors, rank_curve
from tersor.ops.moments import Moments
from tersor.ops.objective import Objective, objective_of
from tersor.ops.rank_forms import factor_shapes, forms_of
from tersor.ops.split_kernels import fit_split, multiplied, split_curve, split_problem

# Of the dense weight's parameters that the factors hold; 20, 40 and 60 % removed are 0.8, 0.6 and 0.4.
SHARES = (0.8, 0.6, 0.4, 0.2)
SEQUENTIAL = ("SVD-LLM", "ours")


def rank_at(outputs: int, inputs: int, share: float) -> int:
    """Rank whose two factors hold a share of the parameters, at least 1."""
    return max(1, int(share * outputs * inputs / (outputs + inputs)))


def _truncated(scaled: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(scaled, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def svd(layer: Layer, share: float) -> Tensor:
    """The nearest weight of that rank."""
    W = layer.weight[0]
    return _truncated(W, rank_at(*W.shape, share)).unsqueeze(0)


def asvd(layer: Layer, share: float) -> Tensor:
    """Columns scaled by the mean |x| to the power 1/2 first.

    Source: Yuan et al. 2023 (ASVD), arXiv:2312.05821, eq. 8-9; alpha 0.5.
    """
    W = layer.weight[0]
    rows = layer.rows
    size = layer.second_moment[0].diagonal().sqrt() if rows is None else rows.double().abs().mean(0)
    scale = size.clamp(min=1e-6 * float(size.max())).sqrt()
    return (_truncated(W * scale, rank_at(*W.shape, share)) / scale).unsqueeze(0)


def svd_llm(layer: Layer, share: float) -> Tensor:
    """Whitened by the Cholesky factor of the second moment.

    Source: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.1.
    """
    W = layer.weight[0]
    L = damped_cholesky(layer.second_moment, 0.0)[0][0]
    cut = _truncated(W @ L, rank_at(*W.shape, share))
    return torch.linalg.solve_triangular(L, cut, upper=False, left=False).unsqueeze(0)


def ours(layer: Layer, share: float) -> Tensor:
    """Directions of the centred outputs, of the weight that was refitted behind a compressed prefix."""
    return _product(_objective(layer), rank_at(*layer.weight.shape[1:], share))


def ours_forms(layer: Layer, share: float) -> Tensor:
    """The same, of a convolution in the form that fits best at as many parameters."""
    W, objective = layer.weight, _objective(layer)
    best = ours(layer, share)
    if not layer.kernel:
        return best
    area = 1
    for size in layer.kernel:
        area *= size
    sizes = LayerSizes(outputs=W.shape[1], inputs=W.shape[2] // area, kernel=layer.kernel)
    for form in forms_of(layer.kernel):
        each = sum(a * b for a, b in factor_shapes(sizes, form, 1))
        rank = int(share * W.numel() / each)
        if form == "output" or rank < 1:
            continue
        curve = split_curve(split_problem(objective, layer.kernel, form))
        fit = fit_split(curve, min(rank, curve.first.shape[1]))
        other = multiplied(curve.problem, fit.first, fit.core)
        if float(objective.error(other).sum()) < float(objective.error(best).sum()):
            best = other
    return best


def _objective(layer: Layer) -> Objective:
    moments = layer.moments
    plain = Moments(count=moments.count, xx=moments.xx, x=moments.x)
    return objective_of(layer.target, plain, 1e-4)


def _product(objective: Objective, rank: int) -> Tensor:
    found = factors(rank_curve(objective), rank)
    return found.left @ found.right


METHODS = {
    "SVD": (svd, REFERENCE),
    "ASVD": (asvd, REFERENCE),
    "SVD-LLM": (svd_llm, REFERENCE),
    "ours": (ours, "tersor"),
    "ours, best form": (ours_forms, "tersor"),
}


def run(subject: Subject, model: str, recorder: Recorder, *, latency: bool = False) -> None:
    """Every cell of one model that is not recorded yet.

    Args:
        subject: The model.
        model: Its name.
        recorder: Of the rows.
        latency: Time one layer after the other, dense and in two factors: for a quiet machine only.
    """
    for share in SHARES:
        setting = f"factors of {share:.0%} of the parameters"
        place = Setting(
            table="lowrank", model=model, name=setting, subject=subject, recorder=recorder
        )
        for name, (method, source) in METHODS.items():
            if name == "ours, best form" and not any(layer.kernel for layer in subject.layers):
                continue

            def solve(layer: Layer, method: object = method, share: float = share) -> Tensor:
                assert callable(method)
                new: Tensor = method(layer, share)
                return new

            place.layers(name, solve, source)
            if name in SEQUENTIAL:
                place.sequential(name, solve, source)
        if latency and not recorder.has("lowrank", model, setting, "latency", "layer"):
            recorder.add(_latency_row(subject, model, setting, share))


def _latency_row(subject: Subject, model: str, setting: str, share: float) -> Row:
    """Dense over factorised time of all linear layers at 64 rows, in PyTorch on this machine."""
    from benchmarks.solvers.cost import seconds_of

    dense = thin = 0.0
    for layer in subject.layers:
        W = layer.weight[0].float()
        rank, x = rank_at(*W.shape, share), torch.randn(64, W.shape[1])
        left, right = torch.randn(W.shape[0], rank), torch.randn(rank, W.shape[1])
        dense += seconds_of(lambda x=x, W=W: x @ W.T)
        thin += seconds_of(lambda x=x, a=right, b=left: (x @ a.T) @ b.T)
    return Row(
        table="lowrank",
        model=model,
        setting=setting,
        method="latency",
        quality={"speedup of layers": dense / thin},
        source=f"torch {version('torch')}",
    )
