"""Normalisations: by stored statistics, or by those of a dimension."""

import sys

from tersor.graph.axes.labels import Dim
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule


def _affine(call: Call, dim: Dim, names: tuple[str, ...]) -> Dim:
    """Scale, shift and statistics go with the dimension."""
    zero = True
    for name in names:
        other = call.maybe(name)
        if other is not None:
            call.unify(dim, other[-1])
            zero = zero and other[-1].zero
    return Dim(dim.rows, zero)


@rule("batch_norm")
def batch_norm(call: Call) -> Result:
    """Each channel by its own statistics, stored or of the batch."""
    x = call.dims("input")
    x[1] = _affine(call, x[1], ("weight", "bias", "running_mean", "running_var"))
    if call["training"]:
        for i, dim in enumerate(x):
            if i != 1:
                call.inexact(dim)
    return x


@rule("instance_norm")
def instance_norm(call: Call) -> Result:
    """Each channel of each sample by its own statistics."""
    x = call.dims("input")
    x[1] = _affine(call, x[1], ("weight", "bias", "running_mean", "running_var"))
    call.freeze(x[2:], "statistics over it")
    return x


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
            call.freeze(x[i], "statistics over units that are not zero when they are removed")
        call.tag(x[i], "stream")
        call.inexact(x[i])
        x[i] = Dim(x[i].rows, call.maybe("weight") is not None)
    return x


@rewrite("layer_norm")
def shrink_layer_norm(edit: Edit) -> None:
    """The shape that is normalised over."""
    x = edit.dims("input")
    rank = len(edit["normalized_shape"])
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
            call.freeze(x[i], "statistics over units that are not zero when they are removed")
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
        import torch

        eps = sys.float_info.epsilon if value is None else torch.finfo(value.dtype).eps
    edit.set(normalized_shape=shape, eps=eps / ratio)
    edit.scale(ratio**-0.5)


@rule("group_norm")
def group_norm(call: Call) -> Result:
    """Groups of channels stay; the same channel of every group goes."""
    x = call.dims("input")
    groups = int(call["num_groups"])
    x[1] = _affine(call, x[1], ("weight", "bias"))
    each = x[1].size // groups
    if each == 1:  # as many groups as channels: nothing is shared
        return x
    rows = x[1].rows
    for k in range(1, groups):
        call.unify(Dim(rows[:each]), Dim(rows[k * each : (k + 1) * each]))
    call.inexact(x[1])
    return x


@rewrite("group_norm")
def shrink_group_norm(edit: Edit) -> None:
    """As many groups as channels stays so."""
    x = edit.dims("input")
    if int(edit["num_groups"]) == x[1].size:
        edit.set(num_groups=edit.count(x[1]))


@rule("local_response_norm")
def local_response_norm(call: Call) -> Result:
    """Neighbouring channels meet."""
    x: Shape = call.dims("input")
    call.freeze(x, "neighbouring units meet")
    return x
