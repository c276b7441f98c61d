"""Factors of an unfolded convolution as weights of convolutions that run one after the other.

All but the last have no bias, so that zeros which the second one pads with are what the first one
would give on padded zeros: the chain is exact at the borders, too. Other paddings than zeros do not
have that property.

Axes: g groups, m outputs of a group, r and s ranks, n = c * kernel unfolded inputs of a group.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.lowrank import Factors
from tersor.ops.split_kernels import Split, SplitFactors


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a convolution moves over its input; zeros are padded. One number a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = {len(v) for v in (self.kernel, self.stride, self.padding, self.dilation)}
        if len(sizes) != 1:
            raise ConfigError(
                f"kernel {self.kernel}, stride {self.stride}, padding {self.padding}, dilation {self.dilation}: "
                "wanted one number a spatial dimension in each"
            )

    def along(self, axes: tuple[int, ...]) -> "Geometry":
        """The part of the convolution along some axes; it stands still along the others."""
        still = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
        return replace(
            self,
            **{
                name: tuple(
                    v if axis in axes else rest for axis, v in enumerate(getattr(self, name))
                )
                for name, rest in still.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStep:
    """One convolution of a chain: its weight [g out, in of a group, *kernel] as torch has it."""

    weight: Float64[Tensor, "..."]
    geometry: Geometry
    groups: int


def output_chain(factors: Factors, geometry: Geometry) -> tuple[ChainStep, ChainStep]:
    """The whole kernel to few channels, then 1 x 1 to all outputs.

    Args:
        factors: Of the unfolded weight.
        geometry: Of the original convolution.

    Raises:
        ShapeError: The factors' inputs are no multiple of the kernel's size.
    """
    groups, rank, inputs = factors.right.shape
    _check_inputs(inputs, geometry)
    first = factors.right.reshape(groups * rank, -1, *geometry.kernel)
    point = geometry.along(())
    return (
        ChainStep(weight=first, geometry=geometry, groups=groups),
        ChainStep(weight=_matrices(factors.left, point), geometry=point, groups=groups),
    )


def split_chain(factors: SplitFactors, geometry: Geometry, split: Split) -> tuple[ChainStep, ...]:
    """Two convolutions, or three where outputs are reduced, too.

    Args:
        factors: From ``fit_split`` with the same split.
        geometry: Of the original convolution.
        split: That of the problem.

    Raises:
        ShapeError: The factors are not of this kernel and split.
    """
    rank = factors.first.shape[1]
    spatial = len(geometry.kernel)
    axes: dict[Split, tuple[int, ...]] = {"input": (), "height": (0,), "width": (1,)}
    before = geometry.along(axes[split])
    after = geometry.along(tuple(a for a in range(spatial) if a not in axes[split]))
    _check_inputs(factors.first.shape[2], before)
    if factors.core.shape[3] != torch.Size(after.kernel).numel():
        raise ShapeError(
            f"core {tuple(factors.core.shape)} [group, out, rank, offset]: wanted the {after.kernel} offsets that "
            f"split {split!r} leaves of kernel {geometry.kernel}; pass the split and kernel of the problem"
        )
    groups = factors.first.shape[0]
    first = factors.first.reshape(groups * rank, -1, *before.kernel)
    core = factors.core.reshape(-1, rank, *after.kernel)
    steps = [
        ChainStep(weight=first, geometry=before, groups=groups),
        ChainStep(weight=core, geometry=after, groups=groups),
    ]
    if factors.last is not None:
        point = geometry.along(())
        steps.append(
            ChainStep(weight=_matrices(factors.last, point), geometry=point, groups=groups)
        )
    return tuple(steps)


def _matrices(factor: Float64[Tensor, "g m r"], point: Geometry) -> Tensor:
    groups, outputs, rank = factor.shape
    return factor.reshape(groups * outputs, rank, *point.kernel)


def _check_inputs(inputs: int, geometry: Geometry) -> None:
    size = torch.Size(geometry.kernel).numel()
    if inputs % size:
        raise ShapeError(
            f"factor of {inputs} inputs a group: no multiple of the {size} elements of kernel {geometry.kernel}; "
            "pass the geometry of the convolution whose inputs were unfolded"
        )
