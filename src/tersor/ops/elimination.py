"""Eliminating units from an inverse and a weight, the others adapting: the steps of ``obs``.

The cost of removing the columns M of a unit is tr(W_M (Hinv_MM)^-1 W_M^T). A removal conditions
Hinv <- Hinv - Hinv_:M (Hinv_MM)^-1 Hinv_M: and adapts W <- W - W_M (Hinv_MM)^-1 Hinv_M:.
Elimination is lazy: a panel of removed columns is kept beside Hinv and W, the scores are exact at
every step, and the matrices are touched once a panel, by a matrix product.

Axes: k units left, g groups, r rows that stand for the outputs, s columns of a unit in a group,
q = k s columns left, t columns or units that leave, a columns of the one unit that leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from tersor.core.errors import NumericalError


@dataclass(slots=True, kw_only=True)
class State:
    """Inverse and weight on the columns that are left."""

    Hinv: Float64[Tensor, "g q q"]
    W: Float64[Tensor, "g r q"]
    size: int


@dataclass(slots=True, kw_only=True)
class _Panel:
    """Columns that left since Hinv and W were touched: they are Hinv - U U^T and W - V U^T."""

    Hinv: Float64[Tensor, "g q q"]
    W: Float64[Tensor, "g r q"]
    U: Float64[Tensor, "g q t"]
    V: Float64[Tensor, "g r t"]
    B: Float64[Tensor, "g k s s"]  # Hinv_MM of every unit, of the current inverse
    A: Float64[Tensor, "g k s s"]  # W_M^T W_M of every unit, of the current weight


def choose(states: Sequence[State], take: int, pool: int) -> Int64[Tensor, " t"]:
    """The next units to remove, greedily, among the ``pool`` cheapest of those that are left."""
    blocks = [_blocks(state) for state in states]
    scores = torch.stack([_scores(B, A) for B, A in blocks]).sum(0)
    candidates = torch.arange(len(scores), device=scores.device)
    if pool < len(scores):
        candidates = scores.topk(pool, largest=False).indices.sort().values
    panels = [
        _panel(state, B[:, candidates], A[:, candidates], candidates)
        for state, (B, A) in zip(states, blocks, strict=True)
    ]
    scores = scores[candidates]
    chosen: list[int] = []
    while True:
        scores[chosen] = math.inf
        chosen.append(int(scores.argmin()))
        if len(chosen) == take:
            return candidates[chosen]
        for panel in panels:
            _eliminate_(panel, chosen[-1])
        scores = torch.stack([_scores(panel.B, panel.A) for panel in panels]).sum(0)


def remove_(state: State, chosen: Int64[Tensor, " t"]) -> Float64[Tensor, " t"]:
    """Remove units in this order, and let the others adapt. Returns what each of them costs."""
    s = state.size
    M = columns_of(chosen, s)
    rest = all_but(M, state.Hinv.shape[1]).nonzero().squeeze(1)
    rows = state.Hinv[:, M]
    C = factor(rows[:, :, M])
    U = torch.linalg.solve_triangular(C, rows[:, :, rest], upper=False).mT
    V = torch.linalg.solve_triangular(C, state.W[:, :, M].mT, upper=False).mT
    # One gather by pairs is half the traffic of two, and this copy is most of a panel's time.
    state.Hinv = state.Hinv[:, rest.unsqueeze(1), rest].baddbmm_(U, U.mT, alpha=-1)
    state.W = state.W[:, :, rest].baddbmm_(V, U.mT, alpha=-1)
    costs: Tensor = V.square().sum((0, 1)).reshape(len(chosen), s).sum(1)
    return costs


def scores_of(state: State) -> Float64[Tensor, " k"]:
    """What removing each unit would cost, the others adapting."""
    return _scores(*_blocks(state))


def _scores(B: Float64[Tensor, "g k s s"], A: Float64[Tensor, "g k s s"]) -> Float64[Tensor, " k"]:
    """tr(W_M B^-1 W_M^T) of every unit, over all groups."""
    if B.shape[-1] == 1:
        return (A / B).sum((0, 2, 3))
    inverse = torch.cholesky_inverse(factor(B))
    return (inverse * A).sum((0, 2, 3))


def _blocks(state: State) -> tuple[Float64[Tensor, "g k s s"], Float64[Tensor, "g k s s"]]:
    """Blocks on the diagonals of Hinv and of W^T W."""
    groups, rows, n_left = state.W.shape
    s = state.size
    blocks = state.Hinv.reshape(groups, n_left // s, s, n_left // s, s)
    B = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    units = state.W.reshape(groups, rows, n_left // s, s)
    if s == 1:
        return B, units.square().sum(1).unsqueeze(3)
    return B, torch.einsum("grks,grkt->gkst", units, units)


def columns_of(units: Int64[Tensor, " k"], size: int) -> Int64[Tensor, " q"]:
    """Places of the columns of these units, unit by unit."""
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def all_but(index: Int64[Tensor, " k"], length: int) -> Bool[Tensor, " length"]:
    """Mask of what is not in the index."""
    mask = torch.ones(length, dtype=torch.bool, device=index.device)
    mask[index] = False
    return mask


def factor(H: Float64[Tensor, "*g n n"]) -> Float64[Tensor, "*g n n"]:
    """Lower Cholesky factor; NumericalError where there is none."""
    result = torch.linalg.cholesky_ex(H)
    if bool(result.info.any()):
        raise NumericalError(
            f"second moment, block {tuple(H.shape[-2:])} of what is left: found a pivot that is not positive, "
            "wanted a positive definite matrix; damp it first: damped(H, 1e-4)"
        )
    L: Tensor = result.L
    return L


def _panel(
    state: State,
    B: Float64[Tensor, "g k s s"],
    A: Float64[Tensor, "g k s s"],
    candidates: Int64[Tensor, " k"],
) -> _Panel:
    Hinv, W = state.Hinv, state.W
    if len(candidates) * state.size < W.shape[2]:
        columns = columns_of(candidates, state.size)
        Hinv, W = Hinv[:, columns][:, :, columns], W[:, :, columns]
    U, V = W.new_zeros(len(W), W.shape[2], 0), W.new_zeros(len(W), W.shape[1], 0)
    return _Panel(Hinv=Hinv, W=W, U=U, V=V, B=B, A=A)


def _eliminate_(panel: _Panel, unit: int) -> None:
    """Condition the blocks of all units on the removal of one."""
    groups, n_units, s, _ = panel.B.shape
    M = slice(unit * s, (unit + 1) * s)
    U, V, W = panel.U, panel.V, panel.W
    h = panel.Hinv[:, M] - U[:, M] @ U.mT
    w = W[:, :, M] - V @ U[:, M].mT
    C = factor(h[:, :, M])
    u = torch.linalg.solve_triangular(C, h, upper=False).mT
    v = torch.linalg.solve_triangular(C, w.mT, upper=False).mT
    mixed = v.mT @ W - (v.mT @ V) @ U.mT  # v^T W of the current weight
    units = u.reshape(groups, n_units, s, s)  # [g, unit, column, a]
    pulls = mixed.reshape(groups, s, n_units, s).permute(0, 2, 1, 3)  # [g, unit, a, column]
    crossed = units @ pulls
    panel.A += units @ (v.mT @ v).unsqueeze(1) @ units.mT - crossed - crossed.mT
    panel.B -= units @ units.mT
    # What has left costs nothing and must stay invertible.
    panel.A[:, unit] = 0
    panel.B[:, unit] = torch.eye(s).to(panel.B)
    panel.U, panel.V = torch.cat([U, u], 2), torch.cat([V, v], 2)
