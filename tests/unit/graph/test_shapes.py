"""Open sizes: read off a call, checked, and put into the shapes of a build."""

import pytest

from tersor.core.errors import ConfigError, DataError
from tersor.core.jsonable import from_json, to_json
from tersor.core.records import Signature, Structure, TensorSpec
from tersor.graph.shapes import LARGEST, built_sizes, check_limits, input_shapes, sizes_of

LEAF = Structure(kind="tensor")


def spec(name: str = "x", **fields: object) -> TensorSpec:
    options: dict[str, object] = {
        "dtype": "float32",
        "shape": (None, 12, 3),
        "dynamic": ("", "length_1", ""),
        "limits": ((0, 0, 0), (4, 20, 4), (0, 0, 0)),
    }
    return TensorSpec(name=name, **options | fields)  # type: ignore[arg-type]


def signature(*inputs: TensorSpec) -> Signature:
    nothing = Structure(kind="tuple")
    return Signature(
        inputs=inputs, outputs=(), args=nothing, kwargs=Structure(kind="dict"), result=LEAF
    )


BOTH = signature(spec(), spec("mask", shape=(None, 12), dynamic=("", "length_1"), limits=()))
FIXED = signature(TensorSpec(name="x", dtype="int64", shape=(None, 5)))


def test_sizes_of_builds_are_the_examples() -> None:
    assert built_sizes(BOTH) == {"length_1": 12}
    assert built_sizes(FIXED) == {}
    assert input_shapes(BOTH, 2) == {"x": (2, 12, 3), "mask": (2, 12)}
    assert input_shapes(FIXED, 7) == {"x": (7, 5)}


def test_sizes_that_are_asked_for() -> None:
    assert input_shapes(BOTH, 2, {"length_1": 8}) == {"x": (2, 8, 3), "mask": (2, 8)}
    for size in (2, 9, 24):
        with pytest.raises(DataError, match=f"found size {size}, wanted 4 to 20 in steps of 4"):
            input_shapes(BOTH, 2, {"length_1": size})


def test_sizes_of_a_call() -> None:
    assert sizes_of(BOTH, {"x": (9, 8, 3), "mask": (9, 8)}) == {"length_1": 8}
    assert sizes_of(FIXED, {"x": (9, 5)}) == {}
    with pytest.raises(DataError) as caught:
        sizes_of(BOTH, {"x": (9, 8, 3), "mask": (9, 12)})
    assert "dimension 1 of input 'mask': found size 12, but dimension 1 of input 'x' has 8" in str(
        caught.value
    )


def test_limits() -> None:
    check_limits(spec(), (1, 16, 3))
    open_ended = spec(limits=((0, 0, 0), (3, LARGEST, 1), (0, 0, 0)))
    check_limits(open_ended, (1, 1 << 20, 3))
    with pytest.raises(DataError, match=r"\(length_1\): found size 2, wanted at least 3; pad"):
        check_limits(open_ended, (1, 2, 3))


def test_the_record() -> None:
    assert [spec().symbol(dim) for dim in range(3)] == ["", "length_1", ""]
    assert FIXED.inputs[0].symbol(1) == ""
    carriers = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "bool": "bool"}
    assert {k: spec(dtype=k).carrier for k in carriers} == carriers
    assert from_json(Signature, to_json(BOTH), "signature") == BOTH
    for field in ({"dynamic": ("", "a")}, {"limits": ((1, 2, 1),)}):
        with pytest.raises(ConfigError, match="wanted none or one for each of the 3 dimensions"):
            spec(**field)
