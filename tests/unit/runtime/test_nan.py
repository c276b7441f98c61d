"""NaN in a sample's input is NaN in its outputs, whatever the build makes of it."""

from typing import Any

import numpy as np

from tersor.artifact import Ranges
from tersor.runtime import Guards, Runner
from tests.unit.runtime.conftest import SIGNATURE, FakeExecutable, two_inputs

SPREADS = Ranges(spreads={"x": ("logits", "score")})


def coded(x: Any, ids: Any) -> Any:
    """As integers have it: NaN is some number."""
    return two_inputs(np.nan_to_num(x, posinf=9.0, neginf=-9.0), ids)


def data() -> tuple[Any, Any]:
    x = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
    x[1, 2] = x[4, 0] = np.nan
    return x, np.arange(5)


def test_samples_with_nan_give_nan() -> None:
    x, ids = data()
    found = Runner(FakeExecutable(coded, 2), SIGNATURE, 2, None, SPREADS)(x, ids)
    logits, (score, top) = found["logits"], found["rest"]
    wanted = coded(x, ids)
    for value, name in ((logits, "logits"), (score, "score")):
        assert np.isnan(value[[1, 4]]).all()
        assert np.array_equal(value[[0, 2, 3]], wanted[name][[0, 2, 3]])
    assert np.array_equal(top, wanted["top"])  # integers have none


def test_outputs_that_do_not_depend_on_it_stay() -> None:
    x, ids = data()
    ranges = Ranges(spreads={"x": ("score",)})
    found = Runner(FakeExecutable(coded, 5), SIGNATURE, 5, None, ranges)(x, ids)
    assert np.isfinite(found["logits"]).all()
    assert np.isnan(found["rest"][0]).sum() == 2


def test_infinities_and_cleaned_inputs_are_no_nan() -> None:
    x, ids = data()
    x[1, 2], x[4, 0] = np.inf, -np.inf  # whose sum is NaN
    runner = Runner(FakeExecutable(coded, 5), SIGNATURE, 5, None, SPREADS)
    assert np.isfinite(runner(x, ids)["rest"][0]).all()
    guards = Guards(policy="clamp", range_factor=None)
    runner = Runner(FakeExecutable(coded, 5), SIGNATURE, 5, guards, SPREADS)
    assert np.isfinite(runner(data()[0], ids)["rest"][0]).all()
