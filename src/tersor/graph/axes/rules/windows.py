"""Pooling, resampling, padding, and rearranging between channels and space."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.graph.axes.labels import NONE, Dim, free
from tersor.graph.axes.rulebook import Call, Result, Shape, rule


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices",
      "max_pool2d_with_indices", "max_pool3d_with_indices",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
      "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def pool(call: Call) -> Result:
    """Samples and channels go along; space is walked over."""
    x = call.dims(next(iter(call.args)))
    has_places = isinstance(call.node.meta["val"], list | tuple)
    sizes = call.outs[0] if has_places else call.out
    space = _space_rank(call.name)
    call.freeze(x[-space:], "a window slides over it")
    found = [*x[:-space], *[free(n) for n in sizes[-space:]]]
    return [found, [Dim(d.rows, zero=False) for d in found]] if has_places else found


def _space_rank(name: str) -> int:
    return int(next(c for c in reversed(name) if c.isdigit()))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Result:
    """Channels go along; space is sampled."""
    x = call.dims("input")
    call.freeze(x[2:], "sampled at computed places")
    call.freeze(call.dims("grid"), "places to sample")
    return [*x[:2], *[free(n) for n in call.out[2:]]]


@rule("affine_grid_generator")
def affine_grid(call: Call) -> Result:
    """Places from matrices."""
    call.freeze(call.dims("theta"), "places to sample")
    return call.blank()


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(call: Call) -> Result:
    """New elements at the borders; constants beside a width stay, copies of its elements do not."""
    x = call.dims(next(iter(call.args)))
    amounts: Sequence[Any] = call["pad"] if call["pad"] is not None else call["padding"]
    is_constant = call.name == "constant_pad_nd" or call["mode"] == "constant"
    padded = set()
    for j in range(len(amounts) // 2):
        i = len(x) - 1 - j
        border = amounts[2 * j : 2 * j + 2]
        if list(border) != [0, 0]:
            x[i] = _padded(call, x[i], border, call.out[i], is_constant=is_constant)
            padded.add(i)
    if not padded or not is_constant or not call["value"]:
        return x
    return [Dim(d.rows, d.zero and padded == {i}) for i, d in enumerate(x)]


def _padded(call: Call, dim: Dim, border: Sequence[Any], size: int, *, is_constant: bool) -> Dim:
    """What is added has no label: it stays, whatever its value."""
    grows = all(isinstance(n, int) and n >= 0 for n in border)
    if dim.is_free or not (grows and is_constant):
        call.freeze(dim, "padded with its own elements, or cut")
        return free(size)
    before, after = (np.full((n, dim.rows.shape[1]), NONE, dtype=np.int64) for n in border)
    return Dim(np.concatenate([before, dim.rows, after]), dim.zero)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Result:
    """Channel c r^2 + k becomes channel c at place k."""
    x, r = call.dims("self"), int(call["upscale_factor"])
    parts = call.labels.split(x[-3], [x[-3].size // (r * r), r * r], call.why("pixel shuffle"))
    call.freeze(parts[1], "channels that become places")
    call.freeze(x[-2:], "channels become places")
    return [*x[:-3], parts[0], *[free(n) for n in call.out[-2:]]]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Result:
    """Places become channels."""
    x, r = call.dims("self"), int(call["downscale_factor"])
    call.freeze(x[-2:], "places become channels")
    merged = call.labels.merge([x[-3], free(r * r)])
    return [*x[:-3], merged, *[free(n) for n in call.out[-2:]]]


@rule("channel_shuffle")
def channel_shuffle(call: Call) -> Result:
    """Channels dealt out to groups."""
    x, groups = call.dims("self"), int(call["groups"])
    parts = call.labels.split(x[1], [groups, x[1].size // groups], call.why("channel shuffle"))
    call.freeze(parts[0], "groups that channels are dealt out to")
    x[1] = call.labels.merge([parts[1], parts[0]])
    return x


@rule("im2col")
def im2col(call: Call) -> Result:
    """Patches: channels times places of the kernel."""
    x = call.dims("self")
    kernel = int(np.prod(call["kernel_size"]))
    call.freeze(x[-2:], "a window slides over it")
    return [*x[:-3], call.labels.merge([x[-3], free(kernel)]), free(call.out[-1])]


@rule("col2im")
def col2im(call: Call) -> Result:
    """Patches added up again."""
    x = call.dims("self")
    kernel = int(np.prod(call["kernel_size"]))
    parts = call.labels.split(x[-2], [x[-2].size // kernel, kernel], call.why("patches"))
    call.freeze(parts[1], "places of a kernel")
    call.freeze(x[-1], "a window slides over it")
    return [*x[:-2], parts[0], *[free(n) for n in call.out[-2:]]]


@rule("unfold")
def unfold(call: Call) -> Result:
    """Windows along one dimension as a new last one."""
    x = call.dims("self")
    at = call.dim(call["dimension"], len(x))
    call.freeze(x[at], "a window slides over it")
    found: Shape = [*x, free(call.out[-1])]
    found[at] = free(call.out[at])
    return found
