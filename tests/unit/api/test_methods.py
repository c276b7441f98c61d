"""Which methods a run asks, and what they offer."""

import re
from typing import Any

import pytest

from tersor.api.session import _check_names, default_methods, pick_methods
from tersor.core.errors import ConfigError
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


@pytest.mark.parametrize("value", [None, 5, [0], ("a", 1)])
def test_what_is_no_list_of_names_is_refused(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"keep: found {value!r}, wanted a tuple of pat")
    ):
        _check_names(value, "all")
    with pytest.raises(ConfigError, match=re.escape(f"methods: found {value!r}, wanted a tuple")):
        _check_names((), value)
    _check_names(["a*"], {"prune"})


def test_all_stands_for_all_also_in_a_list() -> None:
    assert [*pick_methods(["all"], [])] == [*pick_methods("all", [])]
    assert {*pick_methods(["all", "depth"], [])} == {*pick_methods("all", []), "depth"}
