"""The suite's own check of annotations is on: in modules with shapes and in all others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import tersor
from tersor.core.records import Timing
from tersor.ops.bit_packing import pack
from tersor.timing.protocol import plan_rounds
from tests.checking import WITH_SHAPES

PACKAGE = Path(tersor.__file__).parent


def test_a_wrong_argument_and_a_wrong_field_are_refused() -> None:
    wrong: Any = "fast"
    with pytest.raises(BeartypeCallHintViolation):
        plan_rounds(wrong, wrong)
    with pytest.raises(BeartypeCallHintViolation):
        Timing(median_ms=wrong, low_ms=1.0, high_ms=1.0, rounds_ms=(1.0,), runs=3)
    with pytest.raises(TypeCheckError):
        pack(torch.zeros(3), 4)  # no int8


def test_modules_with_shapes_are_checked_for_them() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if "jaxtyping" in p.read_text(encoding="utf-8")]
    names = [".".join(("tersor", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in files]
    assert names
    assert [name for name in names if not name.startswith(WITH_SHAPES)] == []
