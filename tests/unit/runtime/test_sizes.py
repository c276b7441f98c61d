"""Runners over builds of one size, and over executables that take any."""

from typing import Any

import numpy as np
import pytest

from tersor.core.errors import BackendError, DataError
from tersor.core.records import Signature, TensorSpec
from tersor.runtime.runner import Runner


def opened(simple: Any, out: tuple[str, ...] = ("", "length_1")) -> Signature:
    limits = ((0, 0, 0), (2, 9, 1))
    spec = TensorSpec(
        name="x", dtype="float32", shape=(None, 6), dynamic=("", "length_1"), limits=limits
    )
    result = TensorSpec(name="y", dtype="float32", shape=(None, 6), dynamic=out)
    return simple(inputs=(spec,), outputs=(result,))


def doubled(x: Any) -> dict[str, Any]:
    return {"y": x * 2}


class AnySize:
    is_dynamic = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def run(self, inputs: Any) -> Any:
        return self.inner.run(inputs)


def rows(count: int, length: int) -> Any:
    return np.arange(count * length, dtype=np.float32).reshape(count, length)


def test_any_size_that_the_graph_takes(fake: Any, simple: Any) -> None:
    inner = fake(doubled, 2)
    run = Runner(AnySize(inner), opened(simple), 2)
    for length in (2, 5, 9):
        assert np.array_equal(run(rows(3, length)), rows(3, length) * 2)
    assert {a["x"].shape for a in inner.seen} == {(2, 2), (2, 5), (2, 9)}
    assert run(rows(0, 5)).shape == (0, 5)
    with pytest.raises(DataError, match=r"\(length_1\): found size 10, wanted 2 to 9"):
        run(rows(1, 10))


def test_a_build_of_one_size_refuses_another_by_name(fake: Any, simple: Any) -> None:
    run = Runner(fake(doubled, 2), opened(simple), 2)
    assert np.array_equal(run(rows(3, 6)), rows(3, 6) * 2)
    with pytest.raises(DataError) as caught:
        run(rows(3, 5))
    message = str(caught.value)
    assert "input 'x': found size 5 in dimension 1 (length_1), but this build has 6" in message
    assert "pad or crop to 6, or build for that size" in message


def test_other_dimensions_stay_fixed(fake: Any, simple: Any) -> None:
    run = Runner(AnySize(fake(doubled, 2)), opened(simple), 2)
    with pytest.raises(DataError, match=r"found shape \(3,\), wanted \(batch, length_1\)"):
        run(rows(1, 3)[0])
    fixed = Runner(AnySize(fake(doubled, 2)), opened(simple, ()), 2)
    with pytest.raises(BackendError, match=r"gave shape \(2, 5\), wanted \(2, 6\)"):
        fixed(rows(2, 5))


def test_half_precision_travels_as_float32(fake: Any, simple: Any) -> None:
    inner = fake(doubled, 2)
    run = Runner(inner, simple(dtype="float16"), 2)
    found = run(np.ones((1, 3), np.float16))
    assert inner.seen[0]["x"].dtype == np.float32
    assert found.dtype == np.float16
    large = run(np.full((1, 3), 6e4, np.float32))
    assert np.isinf(large).all()  # as in the original
