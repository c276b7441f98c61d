"""Containers of tensors as records: what the export accepts and what it would not."""

import pytest
import torch
from torch import Tensor

from tersor.capture.structures import describe
from tersor.core.errors import CaptureError
from tersor.core.structure import unflatten


def test_order_and_nesting_survive() -> None:
    leaves: list[Tensor] = []
    value = {"b": torch.ones(1), "a": [torch.zeros(2), (None, 3, "x")]}
    structure = describe(value, leaves)
    assert [len(t) for t in leaves] == [1, 2]
    again = unflatten(structure, leaves)
    assert list(again) == ["b", "a"]
    assert again["a"][1] == (None, 3, "x")


def test_what_has_no_plain_form_is_named_with_its_place() -> None:
    with pytest.raises(CaptureError, match=r"output.a\[1\]: found set, wanted tensors in tuples"):
        describe({"a": [1, {2}]}, [])
