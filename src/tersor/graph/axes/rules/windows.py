"""Pooling, resampling, padding, and rearranging between channels and space."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.graph.axes.labels import NONE, Dim, free
from tersor.graph.axes.rulebook import Call, Result, Shape, rule


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices", "lp_pool2d",
      "max_pool3d_with_indices", "max_pool1d_with_indices", "fractional_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
      "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def pool(call: Call) -> Result:
    """Samples and channels go along; space is walked over."""
    x = call.dims(next(iter(call.args)))
    value = call.node.meta["val"]
    sizes = call.outs if isinstance(value, list | tuple) else [call.out]
    space = _space_rank(call.name)
    call.freeze(x[-space:], "a window slides over it")
    found = [[*x[:-space], *[free(n) for n in s[-space:]]] for s in sizes]
    return found if isinstance(value, list | tuple) else found[0]


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
    fill = call["value"] or 0
    for j in range(len(amounts) // 2):
        i = len(x) - 1 - j
        before, after = amounts[2 * j], amounts[2 * j + 1]
        if before == 0 and after == 0:
            continue
        x[i] = _padded(call, x[i], before, after, call.out[i], is_constant=is_constant, fill=fill)
    return x


def _padded(  # noqa: PLR0913 - one border's settings
    call: Call, dim: Dim, before: Any, after: Any, size: int, *, is_constant: bool, fill: Any
) -> Dim:
    numbers = isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0
    if dim.is_free or not (numbers and is_constant):
        call.freeze(dim, "padded with its own elements, or cut")
        return free(size)
    borders = [np.full((n, dim.rows.shape[1]), NONE, dtype=np.int64) for n in (before, after)]
    del fill  # what is added has no label: it stays whatever its value
    return Dim(np.concatenate([borders[0], dim.rows, borders[1]]), dim.zero)


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
    call.freeze(x[2:], "a window slides over it")
    return [x[0], call.labels.merge([x[1], free(kernel)]), free(call.out[2])]


@rule("col2im")
def col2im(call: Call) -> Result:
    """Patches added up again."""
    x = call.dims("self")
    kernel = int(np.prod(call["kernel_size"]))
    parts = call.labels.split(x[1], [x[1].size // kernel, kernel], call.why("patches"))
    call.freeze(parts[1], "places of a kernel")
    call.freeze(x[2], "a window slides over it")
    return [x[0], parts[0], *[free(n) for n in call.out[2:]]]


@rule("unfold")
def unfold(call: Call) -> Result:
    """Windows along one dimension as a new last one."""
    x = call.dims("self")
    at = call.dim(call["dimension"], len(x))
    call.freeze(x[at], "a window slides over it")
    found: Shape = [*x, free(call.out[-1])]
    found[at] = free(call.out[at])
    return found
