"""Scaled dot-product attention."""

import numpy as np

from tersor.graph.axes.labels import Dim
from tersor.graph.axes.rulebook import Call, Result, Shape, rule
from tersor.graph.axes.rules.products import contract


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """Heads go with their keys and values, positions of a head's query with those of its key.

    The scale stays what it was: normalisation has written it out.
    """
    q, k, v = call.dims("query"), call.dims("key"), call.dims("value")
    contract(call, q[-1], k[-1])
    for dim in (q[-1], v[-1]):
        call.tag(dim, "head_dim")
    mask = call.maybe("attn_mask")
    out = [*q[:-1], v[-1]]
    if len(q) > 2:
        heads = q[-3]
        for other in (k[-3], v[-3]):
            call.unify(heads, _shared(call, heads, other))
        call.tag(heads, "heads")
        out[-3] = Dim(heads.rows if not heads.is_free else v[-3].rows, v[-3].zero)
    for i in range(len(q) - 3):
        call.unify(q[i], k[i])
        call.unify(q[i], v[i])
    if mask is not None:
        _mask(call, mask, [*q[:-1], k[-2]])
    return [*[Dim(d.rows, d.zero) for d in out]]


def _shared(call: Call, heads: Dim, other: Dim) -> Dim:
    """Grouped queries: several heads read one key."""
    if other.size == heads.size or other.is_free:
        return other if other.size == heads.size else Dim(np.zeros((heads.size, 0), dtype=np.int64))
    if heads.size % other.size:
        call.freeze([heads, other], "heads do not divide")
        return heads
    return Dim(np.repeat(other.rows, heads.size // other.size, axis=0), other.zero)


def _mask(call: Call, mask: Shape, scores: Shape) -> None:
    for i in range(1, min(len(mask), len(scores)) + 1):
        if mask[-i].size == scores[-i].size and mask[-i].size > 1:
            call.unify(scores[-i], mask[-i])
