"""Normalisations: by stored statistics, or by those of a dimension."""

import sys

import torch

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule
from tersor.graph.axes.rules.restoring import restore

STATISTICS = "statistics over units that are not zero when they are removed"


def _affine(call: Call, dim: Dim, *, centred: bool) -> Dim:
    """Scale, shift and statistics go with the dimension.

    ``centred`` says whether zeros are zero once they are normalised, before scale and shift.
    """
    zero = centred and dim.zero
    for name in ("running_mean", "running_var", "weight", "bias"):
        other = call.maybe(name)
        if other is None:
            continue
        call.unify(dim, other[-1])
        zero = other[-1].zero if name == "weight" else zero and other[-1].zero
    return Dim(dim.rows, zero)


@rule("batch_norm")
def batch_norm(call: Call) -> Result:
    """Each channel by its own statistics, stored or of the batch."""
    x = call.dims("input")
    if call["training"]:
        for dim in [*x[:1], *x[2:]]:
            call.inexact(dim)
    return _channels(call, x, centred=True)


def _channels(call: Call, x: Shape, *, centred: bool) -> Shape:
    """Samples and space are not zero behind a shift."""
    rest = [Dim(d.rows, zero=False) for d in x]
    return [rest[0], _affine(call, x[1], centred=centred), *rest[2:]]


@rule("instance_norm")
def instance_norm(call: Call) -> Result:
    """Each channel of each sample by its own statistics."""
    x = call.dims("input")
    call.freeze(x[2:], "statistics over it")
    return _channels(call, x, centred=True)


@rule("layer_norm")
def layer_norm(call: Call) -> Result:
    """Mean and variance over the last dimensions: removing units changes both."""
    x = call.dims("input")
    rank = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        other = call.maybe(name)
        for i in range(-rank, 0):
            if other is not None:
                call.unify(x[i], other[i])
    for i in range(-rank, 0):
        if not x[i].zero:
            call.freeze(x[i], STATISTICS)
        call.tag(x[i], "stream")
        call.inexact(x[i])
        x[i] = Dim(x[i].rows, call.maybe("weight") is not None)
    bias = call.maybe("bias")
    return [*[Dim(d.rows, d.zero and bias is None) for d in x[:-rank]], *x[-rank:]]


@rewrite("layer_norm")
def shrink_layer_norm(edit: Edit) -> None:
    """The shape that is normalised over, or its units put back as zeros."""
    x = edit.dims("input")
    rank = len(edit["normalized_shape"])
    if edit.exact_norms:
        last, every = range(len(x) - rank, len(x)), range(rank)
        restore(edit, {"input": last, "weight": every, "bias": every}, results=last)
        return
    edit.set(normalized_shape=[edit.count(d) for d in x[-rank:]])


@rule("rms_norm")
def rms_norm(call: Call) -> Result:
    """Mean square over the last dimensions: exact once it is rescaled."""
    x = call.dims("input")
    rank = len(call["normalized_shape"])
    weight = call.maybe("weight")
    for i in range(-rank, 0):
        if weight is not None:
            call.unify(x[i], weight[i])
        if not x[i].zero:
            call.freeze(x[i], STATISTICS)
        call.tag(x[i], "stream")
    return x


@rewrite("rms_norm")
def shrink_rms_norm(edit: Edit) -> None:
    """With r = n' / n: x / sqrt(r m' + eps) = r^(-1/2) x / sqrt(m' + eps / r)."""
    x = edit.dims("input")
    rank = len(edit["normalized_shape"])
    ratio = 1.0
    for dim in x[-rank:]:
        ratio *= edit.count(dim) / dim.size
    shape = [edit.count(d) for d in x[-rank:]]
    eps = edit["eps"]
    value = edit.node.meta.get("val")
    if eps is None:
        eps = sys.float_info.epsilon if value is None else torch.finfo(value.dtype).eps
    edit.set(normalized_shape=shape, eps=eps / ratio)
    edit.scale(ratio**-0.5)


@rule("group_norm")
def group_norm(call: Call) -> Result:
    """A whole group has statistics of its own; the same channel of every group changes them all."""
    x = call.dims("input")
    groups = int(call["num_groups"])
    each = x[1].size // groups
    call.freeze(x[2:], "statistics over it")
    if each > 1:  # with as many groups as channels nothing is shared
        whole, inside = free(groups), x[1]
        if groups > 1:
            whole, inside = call.labels.split(x[1], [groups, each], call.why("groups of a norm"))
        if not x[1].zero:
            call.freeze(inside, STATISTICS)
        call.tag(whole, "groups")
        call.inexact(inside)
        x[1] = call.labels.merge([whole, inside]) if groups > 1 else inside
    return _channels(call, x, centred=each == 1)


@rewrite("group_norm")
def shrink_group_norm(edit: Edit) -> None:
    """As many groups as have channels left, which may get the others back as zeros."""
    x, groups = edit.dims("input"), int(edit["num_groups"])
    each = x[1].size // groups
    left = int(edit.kept(x[1]).reshape(groups, each).any(1).sum())
    edit.set(num_groups=left)
    if edit.exact_norms and edit.count(x[1]) < left * each:
        operands = {"input": [1], "weight": [0], "bias": [0]}
        restore(edit, operands, results=[1], groups=left, each=each)
