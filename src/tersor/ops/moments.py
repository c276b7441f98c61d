"""First and second moments of a layer's input: all that the closed-form solvers need to know.

A layer is seen as ``groups`` independent linear maps: a weight is [g, m, n], an input row [g, n].
A linear layer and an ordinary convolution have one group. Moments are kept as float64 *sums*, so
that parts, batches and processes add exactly; the functions below turn them into means. Products
are taken in float64 as well: a covariance is the small difference of two large sums once the mean
is large, and float32 products would leave only noise of it.

Axes: t rows (samples x positions), g groups, m outputs and n inputs of a group, p inputs of a group
of the original layer (n unless inputs were removed), b batch, c channels.
"""

from dataclasses import dataclass, fields
from functools import reduce

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import pad

from tersor.core.errors import ShapeError
from tersor.ops.remembered import remembered

# Values of one float64 chunk: 4 Mi values are 32 MiB, far above what a matmul needs to be efficient.
CHUNK_VALUES = 2**22

# A channel whose deviation is below four float32 roundings of its mean is constant as far as a
# float32 input can tell. Its float64 "variance" would be the rounding of two large sums.
CONSTANT_VARIANCE = (4 * torch.finfo(torch.float32).eps) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over ``count`` rows of products of a layer's inputs, in float64.

    xh is the input that the compressed layer really sees, x the one that the original layer saw,
    d = s - sh the difference of the other operand of the residual add that follows the layer.
    Fields that are None were not collected: without ``cross`` x equals xh, without ``residual`` d is 0.
    x may have more inputs than xh (p > n), where compression removed some; d then runs over the
    outputs that were kept.
    """

    count: int
    xx: Float64[Tensor, "g n n"]  # sum xh xh^T
    x: Float64[Tensor, "g n"]  # sum xh
    cross: Float64[Tensor, "g p n"] | None = None  # sum x xh^T
    x_original: Float64[Tensor, "g p"] | None = None  # sum x
    xx_original: Float64[Tensor, "g p p"] | None = None  # sum x x^T
    residual: Float64[Tensor, "g m n"] | None = None  # sum d xh^T
    residual_original: Float64[Tensor, "g m p"] | None = None  # sum d x^T
    d: Float64[Tensor, "g m"] | None = None  # sum d
    dd: Float64[Tensor, " g"] | None = None  # sum |d|^2


def moments_of(
    x: Float[Tensor, "t g n"],
    x_original: Float[Tensor, "t g p"] | None = None,
    residual: Float[Tensor, "t g m"] | None = None,
    weights: Float[Tensor, " t"] | None = None,
) -> Moments:
    """Sum the products of all rows.

    Args:
        x: Input of the compressed layer, one row a sample and position; read only.
        x_original: Input of the original layer for the same rows, of as many inputs as that has;
            None where it is the same.
        residual: Original minus compressed value of the other operand of the residual add that
            follows the layer; None where there is none or it is the same.
        weights: How much each row counts, mean 1 so that their sum is the count; None: all alike.

    Returns:
        Moments with the fields of what was given, on the device of ``x``. No more than
        ``CHUNK_VALUES`` values of each argument are held in float64 at a time.
    """
    given = (rows for rows in (x, x_original, residual) if rows is not None)
    width = max(1, *(rows.shape[1] * rows.shape[2] for rows in given))
    rows = max(1, CHUNK_VALUES // width)
    parts = (slice(start, start + rows) for start in range(0, max(1, x.shape[0]), rows))
    return reduce(
        add_moments,
        (
            _moments_of_chunk(
                _by_group(x[part]),
                None if x_original is None else _by_group(x_original[part]),
                None if residual is None else _by_group(residual[part]),
                None if weights is None else weights[part].double().reshape(1, -1, 1),
            )
            for part in parts
        ),
    )


def _by_group(rows: Float[Tensor, "t g k"]) -> Float64[Tensor, "g t k"]:
    return rows.to(torch.float64).transpose(0, 1).contiguous()


def _moments_of_chunk(
    x: Float64[Tensor, "g t n"],
    x_original: Float64[Tensor, "g t p"] | None,
    residual: Float64[Tensor, "g t m"] | None,
    weights: Float64[Tensor, "1 t 1"] | None,
) -> Moments:
    xw = x if weights is None else x * weights
    ow = _weighted(x_original, weights)
    dw = _weighted(residual, weights)
    return Moments(
        count=x.shape[1],
        xx=xw.mT @ x,
        x=xw.sum(1),
        cross=_products(ow, x),
        x_original=None if ow is None else ow.sum(1),
        xx_original=_products(ow, x_original),
        residual=_products(dw, x),
        residual_original=_products(dw, x_original),
        d=None if dw is None else dw.sum(1),
        dd=None if dw is None or residual is None else (dw * residual).sum((1, 2)),
    )


def _weighted(
    rows: Float64[Tensor, "g t k"] | None, weights: Float64[Tensor, "1 t 1"] | None
) -> Float64[Tensor, "g t k"] | None:
    return rows if rows is None or weights is None else rows * weights


def _products(
    a: Float64[Tensor, "g t m"] | None, b: Float64[Tensor, "g t n"] | None
) -> Float64[Tensor, "g m n"] | None:
    return None if a is None or b is None else a.mT @ b


def add_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both; neither is changed.

    Raises:
        ShapeError: One has a field that the other lacks, or their sizes differ.
    """
    total: dict[str, Tensor | int | None] = {"count": a.count + b.count}
    for name in (f.name for f in fields(Moments) if f.name != "count"):
        left, right = getattr(a, name), getattr(b, name)
        shapes = [None if value is None else tuple(value.shape) for value in (left, right)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                f"moments `{name}`: found {shapes[0]} and {shapes[1]}, wanted equal sizes; "
                "collect both parts from the same layer with the same arguments"
            )
        total[name] = None if left is None else left + right
    return Moments(**total)  # type: ignore[arg-type]


def second_moment(moments: Moments) -> Float64[Tensor, "g n n"]:
    """Mean of xh xh^T, not centred, exactly symmetric.

    Raises:
        ShapeError: No rows.
    """
    total = moments.xx + moments.xx.mT
    return total.div_(2 * _count(moments))


@remembered  # a layer's levels, and its error, begin with it each time
def centred(moments: Moments) -> tuple[Float64[Tensor, "g n n"], Float64[Tensor, "g n"]]:
    """Covariance and mean of xh.

    Returns:
        The covariance (divided by the count, exactly symmetric), and the mean, both read only. A channel
        that is constant as far as float32 can tell has exactly zero rows and columns.

    Raises:
        ShapeError: No rows.
    """
    mean, _ = means(moments)
    covariance = second_moment(moments).sub_(_outer(mean, mean))
    moving = _moving(moments)
    if not bool(moving.all()):
        covariance.mul_(moving.unsqueeze(2)).mul_(moving.unsqueeze(1))
    return covariance, mean


def means(moments: Moments) -> tuple[Float64[Tensor, "g n"], Float64[Tensor, "g p"]]:
    """Mean of xh and of the original input; twice that of xh where the original was not collected.

    Raises:
        ShapeError: No rows.
    """
    total = moments.x if moments.x_original is None else moments.x_original
    return moments.x / _count(moments), total / moments.count


def drift_covariance(weight: Float[Tensor, "g m n"], moments: Moments) -> Float64[Tensor, "g m n"]:
    """Covariance with xh of the drift v = W (x - xh) + d, which compression before the layer causes.

    Args:
        weight: W, the original weight; read only.
        moments: Of the layer's inputs. Zero where they hold neither ``cross`` nor ``residual``.

    Raises:
        ShapeError: No rows, or xh has not the inputs of x.
    """
    count = _count(moments)
    _check_same_inputs(moments)
    mean, mean_original = means(moments)
    drift = torch.zeros_like(weight, dtype=torch.float64)
    if moments.cross is not None:
        change = (moments.cross - moments.xx) / count - _outer(mean_original - mean, mean)
        drift = drift + weight.to(torch.float64) @ change
    if moments.residual is not None and moments.d is not None:
        drift = drift + moments.residual / count - _outer(moments.d / count, mean)
    return drift * _moving(moments).unsqueeze(1)


def drift_variance(weight: Float[Tensor, "g m n"], moments: Moments) -> Float64[Tensor, " g"]:
    """Variance of the drift v = W (x - xh) + d, summed over outputs.

    Args:
        weight: W, the original weight; read only.
        moments: Of the layer's inputs. Zero where they hold neither ``cross`` nor ``residual``.

    Raises:
        ShapeError: No rows, xh has not the inputs of x, or a product that this needs was not collected.
    """
    count = _count(moments)
    _check_same_inputs(moments)
    mean, mean_original = means(moments)
    W, moved = weight.to(torch.float64), mean_original - mean
    variance = torch.zeros_like(W[:, 0, 0])
    if moments.cross is not None:
        square = _collected(moments, "xx_original") - 2 * moments.cross + moments.xx
        change = square / count - _outer(moved, moved)
        variance = variance + ((W @ change) * W).sum((1, 2))
    if moments.residual is None:
        return variance
    d = _collected(moments, "d") / count
    variance = variance + _collected(moments, "dd") / count - d.square().sum(1)
    if moments.cross is not None:
        change = (_collected(moments, "residual_original") - moments.residual) / count
        variance = variance + 2 * ((change - _outer(d, moved)) * W).sum((1, 2))
    return variance


def output_covariance(weight: Float[Tensor, "g m p"], moments: Moments) -> Float64[Tensor, "g m n"]:
    """Covariance of the wanted output W x + d with xh, which may have fewer inputs than x.

    Args:
        weight: W, the original weight of the outputs that were kept; read only.
        moments: Of the layer's inputs. Without ``cross`` x is xh.

    Raises:
        ShapeError: No rows.
    """
    count = _count(moments)
    mean, mean_original = means(moments)
    if moments.cross is None:
        inputs, _ = centred(moments)
    else:
        inputs = moments.cross / count - _outer(mean_original, mean)
    covariance = weight.to(torch.float64) @ inputs
    if moments.residual is not None:
        d = _collected(moments, "d") / count
        covariance = covariance + moments.residual / count - _outer(d, mean)
    return covariance * _moving(moments).unsqueeze(1)


def output_variance(weight: Float[Tensor, "g m p"], moments: Moments) -> Float64[Tensor, " g"]:
    """Variance of the wanted output W x + d, summed over outputs.

    Args:
        weight: W, the original weight of the outputs that were kept; read only.
        moments: Of the layer's inputs. Without ``cross`` x is xh.

    Raises:
        ShapeError: No rows, or a product that this needs was not collected.
    """
    count = _count(moments)
    W, (_, mean) = weight.to(torch.float64), means(moments)
    variance = ((W @ original_covariance(moments)) * W).sum((1, 2))
    if moments.residual is None:
        return variance
    d = _collected(moments, "d") / count
    same = moments.cross is None
    products = moments.residual if same else _collected(moments, "residual_original")
    mixed = ((products / count - _outer(d, mean)) * W).sum((1, 2))
    return variance + 2 * mixed + _collected(moments, "dd") / count - d.square().sum(1)


def original_covariance(moments: Moments) -> Float64[Tensor, "g p p"]:
    """Covariance of the original input; that of xh where the original was not collected.

    Raises:
        ShapeError: No rows, or the second moment of the original input was not collected.
    """
    if moments.cross is None:
        return centred(moments)[0]
    xx, x = _collected(moments, "xx_original"), _collected(moments, "x_original")
    return centred(Moments(count=moments.count, xx=xx, x=x))[0]


def _check_same_inputs(moments: Moments) -> None:
    if moments.cross is not None and moments.cross.shape[1] != moments.cross.shape[2]:
        _, original, now = moments.cross.shape
        raise ShapeError(
            f"moments of {original} original and {now} compressed inputs a group have no difference "
            "x - xh: use refit_across and relative_error_across, or keep all inputs"
        )


def _collected(moments: Moments, name: str) -> Tensor:
    value: Tensor | None = getattr(moments, name)
    if value is None:
        raise ShapeError(
            f"moments lack `{name}`, which the error against the original output needs; "
            "collect them with moments_of(x, x_original, residual)"
        )
    return value


def unfold(
    x: Float[Tensor, "b c *space"],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Float[Tensor, "t g n"]:
    """Gather the patches that a convolution multiplies with its weight (im2col), in 1, 2 or 3 dimensions.

    Args:
        x: Input of the convolution; read only.
        kernel: Kernel size, one number a spatial dimension, as the next three.
        stride: Distance of neighbouring patches.
        padding: Zeros added at both ends.
        dilation: Distance of neighbouring kernel elements.
        groups: Groups of the convolution.

    Returns:
        One row a batch element and output position, in this order, so that
        ``einsum("tgn,gmn->tgm", rows, weight.reshape(g, m, n))`` is the convolution without bias,
        n running over channels of the group and kernel elements. In the type of ``x``. All patches
        are held at once: pass few images, or sample rows and add moments.

    Raises:
        ShapeError: Another number of dimensions, channels that do not split into groups, or a
            kernel that exceeds the padded input.
    """
    space = x.shape[2:]
    lengths = {len(space), len(kernel), len(stride), len(padding), len(dilation)}
    if len(lengths) != 1:
        raise ShapeError(
            f"input {tuple(x.shape)} has {len(space)} spatial dimensions; kernel {kernel}, stride {stride}, "
            f"padding {padding}, dilation {dilation}: give one number a spatial dimension each"
        )
    if x.shape[1] % groups:
        raise ShapeError(
            f"input {tuple(x.shape)}: {x.shape[1]} channels do not split into {groups} groups; "
            f"groups must divide {x.shape[1]}"
        )
    patches = pad(x, [size for size in reversed(padding) for _ in range(2)])
    spans = [(k - 1) * step + 1 for k, step in zip(kernel, dilation, strict=True)]
    if any(span > size for span, size in zip(spans, patches.shape[2:], strict=True)):
        raise ShapeError(
            f"input {tuple(x.shape)} padded to {tuple(patches.shape[2:])}: the dilated kernel covers "
            f"{tuple(spans)}; use a larger input, more padding or a smaller kernel"
        )
    for axis, (span, hop, step) in enumerate(zip(spans, stride, dilation, strict=True), start=2):
        patches = patches.unfold(axis, span, hop)[..., ::step]
    n_space = len(space)
    positions = patches.movedim(1, n_space + 1)  # [b, *out, c, *kernel]
    rows = positions.shape[: n_space + 1].numel()
    values = positions.shape[n_space + 1 :].numel() // groups
    return positions.reshape(rows, groups, values)


def _count(moments: Moments) -> int:
    if moments.count < 1:
        raise ShapeError(
            "moments of 0 rows have no mean: give at least one sample, and check that no mask drops all"
        )
    return moments.count


def _outer(a: Float64[Tensor, "g m"], b: Float64[Tensor, "g n"]) -> Float64[Tensor, "g m n"]:
    return a.unsqueeze(2) * b.unsqueeze(1)


def _moving(moments: Moments) -> Bool[Tensor, "g n"]:
    square = moments.xx.diagonal(dim1=1, dim2=2) / moments.count
    variance = square - (moments.x / moments.count).square()
    return variance > CONSTANT_VARIANCE * square
