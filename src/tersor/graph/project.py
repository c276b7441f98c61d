"""A low-rank layer whose weight has changed, at once: the last factor stays, the first one follows.

Behind a cut a layer has fewer outputs and inputs and another weight W. Its last factor keeps the rows
that are left, and the first one is the least-squares solution for W: what passes between them stays
about what it was, and with it the quantiser of that. It is what an evaluation needs; the final factors
come from the transform.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.graph.contracts import Factor, Quantizer, SiteChange
from tersor.graph.quantizer import column_scale
from tersor.ops.grids import round_nearest, weight_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What has become of a layer.

    Attributes:
        weight: Its weight now [c_out, c_in, *kernel], float64.
        bias: Its bias now [c_out], float64, or None.
        bias_before: Of the original layer, or None.
        kept: Which outputs of the original are left, as booleans.
        quantizer: Of the tensor that it reads, or None.
    """

    weight: Tensor
    bias: Tensor | None
    bias_before: Tensor | None
    kept: Tensor
    quantizer: Quantizer | None


def projected(change: SiteChange, moved: Moved) -> SiteChange:
    """The change for the layer as it is now.

    Raises:
        ShapeError: More than two factors.
    """
    if len(change.factors) != 2:
        raise ShapeError(
            f"{change.site.name}: {len(change.factors)} factors can't follow a width that was cut, "
            "only two can; take lowrank out of methods="
        )
    first, last = change.factors
    weight = moved.weight
    columns = column_scale(weight.reshape(1, len(weight), -1), moved.quantizer)
    if columns is not None:
        weight = (weight.reshape(1, len(weight), -1) * columns).reshape(weight.shape)
    rows = last.dense().double()[moved.kept]
    fresh = _followed(rows, weight, first)
    last = replace(last, codes=_rows(last.codes, moved.kept), scale=_rows(last.scale, moved.kept),
                   weight=_rows(last.weight, moved.kept))  # fmt: skip
    if first.codes is None:
        first = replace(first, weight=fresh.float())
    else:
        flat = fresh.reshape(1, len(fresh), -1)
        limit = max(1, int(first.codes.abs().max()))
        step = weight_steps(flat, limit).float().double()
        codes = round_nearest(flat, step, limit).reshape(fresh.shape)
        first = replace(first, codes=codes, scale=step.reshape(-1).float())
    offset, bias = _biases(change, moved, (first, last))
    return replace(
        change,
        site=replace(change.site, shape=tuple(weight.shape)),
        factors=(replace(first, bias=offset), last),
        bias=bias.float(),
        quantizer=moved.quantizer,
    )


def _rows(tensor: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[kept]


def _followed(last: Tensor, weight: Tensor, first: Factor) -> Tensor:
    """The first factor for a last one [m, r, *kernel] and a weight [m, c, *kernel]: least squares."""
    axes = range(2, weight.dim())
    own = [
        a for a in axes if first.dense().shape[a] > 1
    ]  # of the kernel, what the first one covers
    others = [a for a in axes if a not in own]
    wanted = weight.permute(0, *others, 1, *own)
    wanted = wanted.reshape(-1, weight.shape[1] * _size(weight, own))
    system = last.permute(0, *others, *own, 1).reshape(-1, last.shape[1])
    found: Tensor = torch.linalg.pinv(system) @ wanted
    kernel = [weight.shape[a] if a in own else 1 for a in axes]
    return found.reshape(last.shape[1], weight.shape[1], *kernel)


def _size(weight: Tensor, axes: Sequence[int]) -> int:
    size = 1
    for axis in axes:
        size *= weight.shape[axis]
    return size


def _biases(
    change: SiteChange, moved: Moved, factors: tuple[Factor, Factor]
) -> tuple[Tensor | None, Tensor]:
    """The first op's bias, and the last one's: what was lost on average is taken to be lost again.

    A first op with a bias of its own is centred: (first (x + shift) + offset) has no mean.
    """
    assert change.bias is not None  # of every change with factors
    shift = 0.0 if moved.quantizer is None else moved.quantizer.shift
    none = torch.zeros(len(moved.kept), dtype=torch.float64)
    before = none if moved.bias_before is None else moved.bias_before
    bias = none[moved.kept] if moved.bias is None else moved.bias
    lost, offset = change.bias.double() - before, change.factors[0].bias
    if offset is None:
        return None, bias + lost[moved.kept]
    first, last = (f.dense().double().flatten(1) for f in factors)
    if change.factors[1].dense()[0, 0].numel() > 1:  # it only undoes the shift
        return -(shift * first.sum(1)).float(), bias + lost[moved.kept]
    old_first, old_last = (f.dense().double().flatten(1) for f in change.factors)
    lost = lost + old_last @ (offset + shift * old_first.sum(1))
    # The refit moves means between weight and bias; what passes between the factors shall not move.
    centre = offset + torch.linalg.pinv(last) @ (bias - before[moved.kept])
    return centre.float(), bias + lost[moved.kept] - last @ (centre + shift * first.sum(1))
