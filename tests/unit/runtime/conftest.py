from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tersor.core.records import Signature, Structure, TensorSpec

LEAF = Structure(kind="tensor")


class FakeExecutable:
    """A NumPy function that runs one batch size only, as a build does."""

    def __init__(self, function: Callable[..., dict[str, Any]], batch: int | None) -> None:
        self.function = function
        self.batch = batch
        self.seen: list[dict[str, Any]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        for array in inputs.values():
            assert type(array) is np.ndarray
            assert self.batch is None or array.shape[0] == self.batch
        self.seen.append({name: array.copy() for name, array in inputs.items()})
        return self.function(**inputs)


def two_inputs(x: Any, ids: Any) -> dict[str, Any]:
    """Rows do not influence each other; outputs of three ranks and types."""
    return {
        "logits": (x * 2 + ids[:, None]).astype(np.float32),
        "score": (x.sum(axis=1) + ids).astype(np.float32),
        "top": ids * 3,
    }


SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=(None, 3)),
        TensorSpec(name="ids", dtype="int64", shape=(None,)),
    ),
    outputs=(
        TensorSpec(name="logits", dtype="float32", shape=(None, 3)),
        TensorSpec(name="score", dtype="float32", shape=(None,)),
        TensorSpec(name="top", dtype="int64", shape=(None,)),
    ),
    args=Structure(kind="tuple", children=(LEAF,)),
    kwargs=Structure(kind="dict", keys=("ids",), children=(LEAF,)),
    result=Structure(
        kind="dict",
        keys=("logits", "rest"),
        children=(LEAF, Structure(kind="tuple", children=(LEAF, LEAF))),
    ),
    parameter_names=("x", "ids"),
)


def one_input(
    shape: Any = (None, 3), dtype: str = "float32", out: Any = None, **fields: Any
) -> Signature:
    """A signature x -> y."""
    options: dict[str, Any] = {
        "inputs": (TensorSpec(name="x", dtype=dtype, shape=shape),),
        "outputs": (TensorSpec(name="y", dtype=dtype, shape=shape if out is None else out),),
        "args": Structure(kind="tuple", children=(LEAF,)),
        "kwargs": Structure(kind="dict"),
        "result": LEAF,
        "parameter_names": ("x",),
    }
    return Signature(**options | fields)


@pytest.fixture
def fake() -> type[FakeExecutable]:
    return FakeExecutable


@pytest.fixture
def signature() -> Signature:
    return SIGNATURE


@pytest.fixture
def function() -> Callable[..., dict[str, Any]]:
    return two_inputs


@pytest.fixture
def simple() -> Callable[..., Signature]:
    return one_input
