"""Which ranks are worth a price, and what factors of each form are."""

import pytest
import torch

from tersor.core.errors import ConfigError
from tersor.ops.factor_costs import LayerSizes, dense_cost, height_cost, output_cost, width_cost
from tersor.ops.rank_forms import (
    Form,
    as_form,
    factor_shapes,
    forms_of,
    full_rank,
    offered_ranks,
    rank_limit,
)

CONV = LayerSizes(outputs=48, inputs=32, kernel=(3, 5), positions_in=(1, 1), positions_out=(1, 1))
COSTS = {"output": output_cost, "height": height_cost, "width": width_cost}


@pytest.mark.parametrize("form", ["output", "height", "width"])
def test_shapes_hold_the_parameters_that_are_counted(form: Form) -> None:
    limit = rank_limit(CONV, form)
    shapes = factor_shapes(CONV, form, limit)
    assert sum(a * b for a, b in shapes) == COSTS[form](CONV, limit).parameters
    assert COSTS[form](CONV, limit).within(dense_cost(CONV))
    over = COSTS[form](CONV, limit + 1)
    assert limit == full_rank(CONV, form) or not over.within(dense_cost(CONV))


def test_a_stride_makes_the_first_factor_of_a_split_kernel_dearer() -> None:
    strided = LayerSizes(
        outputs=48, inputs=32, kernel=(3, 3), positions_in=(2, 2), positions_out=(1, 1)
    )
    even = LayerSizes(
        outputs=48, inputs=32, kernel=(3, 3), positions_in=(1, 1), positions_out=(1, 1)
    )
    assert rank_limit(strided, "height") < rank_limit(even, "height")
    assert rank_limit(strided, "output") == rank_limit(even, "output")


def test_full_ranks() -> None:
    assert full_rank(LayerSizes(outputs=7, inputs=9), "output") == 7
    assert full_rank(CONV, "output") == 48
    assert full_rank(CONV, "height") == min(32 * 3, 48 * 5)
    assert full_rank(CONV, "width") == min(32 * 5, 48 * 3)


def test_forms_of_kernels() -> None:
    assert forms_of(()) == forms_of((1, 1)) == ("output",)
    assert forms_of((3,)) == ("output", "input")
    assert forms_of((3, 1)) == ("output", "height", "width")
    assert as_form("width") == "width"
    with pytest.raises(ConfigError, match="found 'depth', wanted one of"):
        as_form("depth")


@pytest.mark.parametrize(
    ("limit", "step", "wanted"),
    [
        (191, 16, (176, 128, 96, 48)),  # 11 tiles
        (307, 64, (256, 192, 128, 64)),
        (40, 16, (32, 16)),
        (31, 16, (24, 16, 8)),  # fewer than two tiles: half ones
        (14, 64, (8,)),
        (7, 8, ()),
        (0, 16, ()),
    ],
)
def test_ranks_are_whole_tiles(limit: int, step: int, wanted: tuple[int, ...]) -> None:
    assert offered_ranks(limit, step, 4) == wanted
    assert len(torch.tensor(wanted).unique()) == len(wanted)
