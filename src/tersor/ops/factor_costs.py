"""What factors of a layer store and compute, and up to which rank that is less than the layer does.

Counts only: whether fewer operations are faster is measured, never derived (DESIGN, law 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tersor.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """Sizes of a linear layer or convolution; a linear layer has an empty kernel.

    Attributes:
        outputs, inputs: Channels of all groups together.
        groups: Divides both.
        kernel: Kernel size.
        positions_in, positions_out: Input and output size in space (or tokens); empty: one position.
    """

    outputs: int
    inputs: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    positions_in: tuple[int, ...] = ()
    positions_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.outputs, self.inputs, self.groups) < 1 or (
            self.outputs % self.groups or self.inputs % self.groups
        ):
            raise ConfigError(
                f"layer of {self.outputs} outputs, {self.inputs} inputs, {self.groups} groups: wanted positive "
                "numbers, groups a divisor of both"
            )
        if len(self.positions_in) != len(self.positions_out):
            raise ConfigError(
                f"positions {self.positions_in} in and {self.positions_out} out: wanted as many dimensions in both"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Stored weights (no biases) and multiply-accumulates of one sample."""

    parameters: int
    macs: int

    def within(self, other: "Cost", share: float = 1.0) -> bool:
        """Whether both counts are below this share of the other's."""
        return self.parameters < share * other.parameters and self.macs < share * other.macs


def dense_cost(layer: LayerSizes) -> Cost:
    """Of the layer as it is."""
    parameters = layer.outputs * layer.inputs // layer.groups * prod(layer.kernel)
    return Cost(parameters=parameters, macs=parameters * prod(layer.positions_out))


def output_cost(layer: LayerSizes, rank: int) -> Cost:
    """Of the whole kernel to ``rank`` channels a group, then 1 x 1; a linear layer's two products."""
    out = prod(layer.positions_out)
    first = rank * layer.inputs * prod(layer.kernel)
    last = rank * layer.outputs
    return Cost(parameters=first + last, macs=(first + last) * out)


def input_cost(layer: LayerSizes, rank: int) -> Cost:
    """Of 1 x 1 to ``rank`` channels a group at the input's positions, then the whole kernel."""
    first = rank * layer.inputs
    core = rank * layer.outputs * prod(layer.kernel)
    macs = first * prod(layer.positions_in) + core * prod(layer.positions_out)
    return Cost(parameters=first + core, macs=macs)


def height_cost(layer: LayerSizes, rank: int) -> Cost:
    """Of kh x 1 to ``rank`` channels a group, then 1 x kw; two spatial dimensions."""
    return _separable(layer, rank, first_axis=0)


def width_cost(layer: LayerSizes, rank: int) -> Cost:
    """Of 1 x kw to ``rank`` channels a group, then kh x 1; two spatial dimensions."""
    return _separable(layer, rank, first_axis=1)


def tucker_cost(layer: LayerSizes, rank: int, rank_out: int) -> Cost:
    """Of 1 x 1 to ``rank`` channels a group, the kernel to ``rank_out``, and 1 x 1 to all outputs."""
    first, last = rank * layer.inputs, rank_out * layer.outputs
    core = layer.groups * rank * rank_out * prod(layer.kernel)
    macs = first * prod(layer.positions_in) + (core + last) * prod(layer.positions_out)
    return Cost(parameters=first + core + last, macs=macs)


def largest_rank(
    layer: LayerSizes, cost: Callable[[LayerSizes, int], Cost], share: float = 1.0
) -> int:
    """Largest rank whose weights and operations are both below a share of the dense layer's.

    Args:
        layer: The layer.
        cost: ``output_cost``, ``input_cost``, ``height_cost`` or ``width_cost``; for Tucker-2 a function that
            ties the second rank to the first.
        share: What is left of the dense layer at most, > 0.

    Returns:
        The rank, 0 where even rank 1 costs as much: do not factorise.

    Raises:
        ConfigError: ``share`` is not positive.
    """
    if not share > 0:
        raise ConfigError(f"share must be > 0, got {share}; 1.0 is break-even")
    dense = dense_cost(layer)
    low, high = 0, max(layer.outputs, layer.inputs * prod(layer.kernel)) + 1
    while high - low > 1:  # costs rise with the rank
        middle = (low + high) // 2
        if cost(layer, middle).within(dense, share):
            low = middle
        else:
            high = middle
    return low


def _separable(layer: LayerSizes, rank: int, first_axis: int) -> Cost:
    if len(layer.kernel) != 2 or len(layer.positions_out) not in (0, 2):
        raise ConfigError(
            f"kernel {layer.kernel}, positions {layer.positions_out}: a separable kernel needs two dimensions; "
            "use the input or output form"
        )
    second_axis = 1 - first_axis
    first = rank * layer.inputs * layer.kernel[first_axis]
    second = rank * layer.outputs * layer.kernel[second_axis]
    if not layer.positions_out:
        return Cost(parameters=first + second, macs=first + second)
    # Only the first axis has its output size yet.
    between = layer.positions_out[first_axis] * layer.positions_in[second_axis]
    return Cost(
        parameters=first + second, macs=first * between + second * prod(layer.positions_out)
    )
