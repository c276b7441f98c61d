"""Maps of whole heads that put the dimensions worth keeping in front, and change nothing by themselves.

``heads`` says which r directions of a head are best. Here they are completed to an invertible map of
the head, so that narrowing it is the removal of its last d - r dimensions, like that of any other
units: orthogonal for values, where the reader is fitted again afterwards; a pair whose product is the
identity for queries and keys.

Axes: h value or key heads, q query heads, d dimensions of a head, m outputs, n = q d inputs.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tersor.ops.heads import reduce_values, score_curve
from tersor.ops.objective import Objective
from tersor.ops.obs import Consumer
from tersor.ops.refit import layer_loss

SWEEPS = 2
# Unknowns r d of one head's system beyond which its cubic cost is not worth a better start.
MOST_UNKNOWNS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTurn:
    """Maps of both sides of a width: keep the first dimensions of each head.

    Attributes:
        first: Of values, or of queries.
        second: Of what reads the values, along its inputs, or of keys.
        loss: What the removal costs, of the reader's output or of the scores' mean square.
        damping: In use.
    """

    first: Float64[Tensor, "h1 d d"]
    second: Float64[Tensor, "h2 d d"]
    loss: float
    damping: float


def value_turn(
    reader: Consumer, columns: Int64[Tensor, "q d"], rank: int, *, sharing: int = 1
) -> HeadTurn:
    """Orthogonal maps whose first ``rank`` rows span what ``reduce_values`` keeps of each value head.

    Args:
        reader: The projection behind the heads, one group; its moment is damped already; read only.
        columns: Its inputs by head and dimension: all of them.
        rank: Dimensions of a head that are to be kept, 1..d.
        sharing: Heads that one value head serves, neighbours.

    Raises:
        ConfigError: A rank out of range.
        ShapeError: Inputs that do not split into heads.
        NumericalError: The moment is not finite.
    """
    heads, d = columns.shape
    objective = _objective(reader, columns.flatten())
    sweeps = SWEEPS if rank * d <= MOST_UNKNOWNS else 0
    found = reduce_values(objective, heads, rank, sharing=sharing, sweeps=sweeps)
    # Scales of rows are of no interest: the reader is fitted to whatever spans the same.
    size = found.maps.norm(dim=2, keepdim=True)
    rows = found.maps / torch.where(size > 0, size, 1.0)
    basis, _ = torch.linalg.qr(rows.mT, mode="complete")
    turn = basis.mT.contiguous()
    return HeadTurn(
        first=turn,
        second=turn.repeat_interleave(sharing, 0),
        loss=found.error / max(float(objective.variance.sum()), 1e-30),
        damping=found.damping,
    )


def score_turn(
    queries: Float[Tensor, "h d d"], keys: Float[Tensor, "h d d"], rank: int, *, sharing: int = 1
) -> HeadTurn:
    """Maps of queries and keys with F^T E = I, whose first ``rank`` rows change scores least.

    Args:
        queries: E[q q^T], summed over the query heads of a key head; read only.
        keys: Cov(k); read only.
        rank: Dimensions that are to be kept, 0..d: the maps are the same for all.
        sharing: Query heads of a key head, neighbours.

    Raises:
        ShapeError: The two differ in size.
        NumericalError: A moment is not finite or not positive semi-definite.
    """
    curve = score_curve(queries, keys)
    total = float(curve.errors[:, 0].sum())
    return HeadTurn(
        first=curve.queries.repeat_interleave(sharing, 0),
        second=curve.keys,
        loss=float(curve.errors[:, rank].sum()) / max(total, 1e-30),
        damping=curve.damping,
    )


def turned_consumer(
    reader: Consumer, columns: Int64[Tensor, "q d"], maps: Float[Tensor, "q d d"]
) -> Consumer:
    """A reader of one group on turned inputs: orthogonal maps, along weight and second moment."""
    order = columns.flatten()
    block = torch.block_diag(*maps.double())
    whole = torch.eye(reader.weight.shape[2], dtype=torch.float64)
    whole[order.unsqueeze(1), order] = block
    return replace(
        reader,
        weight=reader.weight.double() @ whole.mT,
        second_moment=whole @ reader.second_moment.double() @ whole.mT,
    )


def _objective(reader: Consumer, order: Int64[Tensor, " n"]) -> Objective:
    """The reader on inputs in the order of heads, without any damping of its own."""
    weight = reader.weight.double()[:, :, order]
    H = reader.second_moment.double()[:, order][:, :, order]
    outputs, inputs = weight.shape[1:]
    zero = weight.new_zeros
    return Objective(
        weight=weight,
        H=H,
        residual=torch.zeros_like(weight),
        mean=zero(1, inputs),
        shift=zero(1, outputs),
        floor=zero(1),
        variance=layer_loss(weight, H),
        damping=0.0,
    )
