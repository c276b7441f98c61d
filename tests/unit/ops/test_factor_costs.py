"""Counts are those of the tensors that the chains have; break-even is where they cross."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.ops.factor_costs import (
    Cost,
    LayerSizes,
    dense_cost,
    height_cost,
    input_cost,
    largest_rank,
    output_cost,
    tucker_cost,
    width_cost,
)


def counted(*convolutions: tuple[int, int, int, int, tuple[int, int]]) -> tuple[int, int]:
    """Parameters and MACs of (outputs, inputs a group, kh, kw, output size) by counting zeros."""
    tensors = [torch.zeros(o, i, a, b).numel() for o, i, a, b, _ in convolutions]
    return sum(tensors), sum(
        n * size[0] * size[1] for n, (*_, size) in zip(tensors, convolutions, strict=True)
    )


LAYER = LayerSizes(
    outputs=12, inputs=8, groups=2, kernel=(3, 5), positions_in=(14, 20), positions_out=(7, 10)
)


def test_counts_by_definition() -> None:
    out, full = (7, 10), (14, 20)
    for cost, wanted in (
        (dense_cost(LAYER), counted((12, 4, 3, 5, out))),
        (output_cost(LAYER, 3), counted((6, 4, 3, 5, out), (12, 3, 1, 1, out))),
        (input_cost(LAYER, 3), counted((6, 4, 1, 1, full), (12, 3, 3, 5, out))),
        (height_cost(LAYER, 3), counted((6, 4, 3, 1, (7, 20)), (12, 3, 1, 5, out))),
        (width_cost(LAYER, 3), counted((6, 4, 1, 5, (14, 10)), (12, 3, 3, 1, out))),
        (
            tucker_cost(LAYER, 3, 2),
            counted((6, 4, 1, 1, full), (4, 3, 3, 5, out), (12, 2, 1, 1, out)),
        ),
    ):
        assert (cost.parameters, cost.macs) == wanted


def test_a_linear_layer_breaks_even_at_mn_over_m_plus_n() -> None:
    layer = LayerSizes(outputs=384, inputs=1536)
    assert dense_cost(layer).macs == 384 * 1536
    assert largest_rank(layer, output_cost) == 307  # 307.2
    assert largest_rank(LayerSizes(outputs=64, inputs=64), output_cost) == 31  # 32 only breaks even
    assert largest_rank(layer, output_cost, share=0.5) == 153


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([output_cost, input_cost, height_cost, width_cost]),
    st.floats(0.05, 1.5),
)
def test_the_largest_rank_is_the_last_that_is_below(
    m: int, c: int, cost: Callable[[LayerSizes, int], Cost], share: float
) -> None:
    layer = LayerSizes(
        outputs=m, inputs=c, kernel=(3, 3), positions_in=(8, 8), positions_out=(4, 4)
    )
    rank, dense = largest_rank(layer, cost, share), dense_cost(layer)
    assert rank == 0 or cost(layer, rank).within(dense, share)
    assert not cost(layer, rank + 1).within(dense, share)


def test_one_channel_is_not_factorised() -> None:
    depthwise = LayerSizes(outputs=8, inputs=8, groups=8, kernel=(3, 3))
    assert largest_rank(depthwise, output_cost) == 0
    assert largest_rank(depthwise, input_cost) == 0
    assert largest_rank(depthwise, height_cost) == 1  # 3 + 3 of 9


def test_messages() -> None:
    with pytest.raises(ConfigError, match="groups a divisor of both"):
        LayerSizes(outputs=6, inputs=4, groups=4)
    with pytest.raises(ConfigError, match="as many dimensions in both"):
        LayerSizes(outputs=6, inputs=4, positions_in=(3, 3))
    with pytest.raises(ConfigError, match="needs two dimensions"):
        height_cost(LayerSizes(outputs=6, inputs=4, kernel=(3,)), 2)
    with pytest.raises(ConfigError, match="share must be > 0"):
        largest_rank(LAYER, output_cost, 0.0)
