"""Scaled dot-product attention."""

import numpy as np

from tersor.graph.axes.labels import Dim, free
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
    call.freeze([k[-2], v[-2]], "shares a softmax")
    if call["is_causal"]:
        call.freeze(q[-2], "positions are compared over it")
    samples = [_sample(call, q, k, v, i) for i in range(-len(q), -3)]
    heads = [_heads(call, q[-3], k[-3], v[-3])] if len(q) > 2 else []
    mask = call.maybe("attn_mask")
    if mask is not None:
        _mask(call, mask, [*samples, *heads, q[-2], k[-2]])
    return [*samples, *heads, Dim(q[-2].rows, zero=False), v[-1]]


def _sample(call: Call, q: Shape, k: Shape, v: Shape, i: int) -> Dim:
    """Samples go along; without values the result is zero."""
    if len({q[i].size, k[i].size, v[i].size}) > 1:
        call.freeze([q[i], k[i], v[i]], "a broadcast inside attention")
        return free(call.out[i])
    call.unify(q[i], k[i])
    call.unify(q[i], v[i])
    return Dim(q[i].rows, v[i].zero)


def _heads(call: Call, q: Dim, k: Dim, v: Dim) -> Dim:
    """Heads go with the keys and values that they read; one key for all stays."""
    if max(k.size, v.size) > q.size:
        call.freeze([q, k, v], "a broadcast inside attention")
        return free(call.out[-3])
    for other in (k, v):
        if other.size > 1:
            call.unify(q, _shared(call, q, other))
    call.tag(q, "heads")
    return Dim(q.rows, v.zero and v.size > 1)


def _shared(call: Call, heads: Dim, other: Dim) -> Dim:
    """Grouped queries: several heads read one key."""
    if heads.size % other.size:
        call.freeze([heads, other], "heads do not divide")
        return heads
    return Dim(np.repeat(other.rows, heads.size // other.size, axis=0), other.zero)


def _mask(call: Call, mask: Shape, scores: Shape) -> None:
    for i in range(1, min(len(mask), len(scores)) + 1):
        if mask[-i].size == scores[-i].size and mask[-i].size > 1:
            call.unify(scores[-i], mask[-i])
