"""Which methods a run asks, and what they offer."""

import pytest

from tersor.api.session import default_methods, pick_methods
from tersor.methods.quantize import Quantize


def test_methods_that_take_long_have_to_be_named() -> None:
    names = default_methods()
    assert {"prune", "quantize"} <= {*names}
    assert not {"activation", "codebook", "datafree", "depth", "lowrank", "sparsify"} & {*names}
    assert {*pick_methods("all", [])} == {*names}
    assert {*pick_methods(("codebook", "quantize"), [])} == {"codebook", "quantize"}


@pytest.mark.parametrize("for_size", [False, True])
def test_low_bits_are_offered_where_bytes_have_a_budget(for_size: bool) -> None:
    found = pick_methods(("quantize",), [], for_size=for_size)["quantize"]
    assert isinstance(found, Quantize)
    assert found.low_bits == for_size
