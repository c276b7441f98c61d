from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.artifact import Range, Ranges
from tersor.core.errors import BackendError, ConfigError, DataError, GuardError, ShapeError
from tersor.core.records import Structure, TensorSpec
from tersor.runtime import Guards, Runner

ONCE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def data(n: int, seed: Any = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3)).astype(np.float32), rng.integers(0, 9, n)


@ONCE
@given(n=st.integers(1, 20), built=st.integers(1, 8), seed=st.integers(0, 99))
def test_any_batch_equals_the_function_on_the_whole_batch(
    fake: Any, signature: Any, function: Any, n: int, built: Any, seed: Any
):
    x, ids = data(n, seed)
    executable = fake(function, built)
    runner = Runner(executable, signature, built)
    result = runner(x, ids=ids)
    wanted = function(x, ids)
    assert list(result) == ["logits", "rest"]
    assert type(result["rest"]) is tuple
    for found, name in zip((result["logits"], *result["rest"]), wanted, strict=True):
        assert found.dtype == wanted[name].dtype
        np.testing.assert_array_equal(found, wanted[name])
    n_chunks = -(-n // built)
    stats = runner.stats()
    assert len(executable.seen) == stats["chunks"] == n_chunks
    assert stats["padded_rows"] == n_chunks * built - n
    assert (stats["calls"], stats["samples"], stats["rejected"]) == (1, n, 0)


def test_the_last_chunk_is_filled_with_its_last_row(fake: Any, signature: Any, function: Any):
    x, ids = data(6)
    executable = fake(function, 4)
    Runner(executable, signature, 4)(x, ids)
    np.testing.assert_array_equal(executable.seen[1]["x"], x[[4, 5, 5, 5]])
    np.testing.assert_array_equal(executable.seen[1]["ids"], ids[[4, 5, 5, 5]])


def test_the_callers_arrays_are_not_changed(fake: Any, signature: Any, function: Any):
    x, ids = data(3)
    before = x.copy(), ids.copy()
    guards = Guards(policy="clamp", range_factor=1.0)
    ranges = Ranges(inputs={"x": Range(low=-0.1, high=0.1)})
    Runner(fake(function, 2), signature, 2, guards, ranges)(x, ids)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(ids, before[1])


def test_both_ways_of_calling(fake: Any, signature: Any, function: Any):
    x, ids = data(3)
    runner = Runner(fake(function, 2), signature, 2)
    for result in (runner(x, ids), runner(x=x, ids=ids), runner(ids=ids, x=x)):
        np.testing.assert_array_equal(result["logits"], function(x, ids)["logits"])


def test_a_batch_of_zero(fake: Any, signature: Any, function: Any):
    x, ids = data(0)
    executable = fake(function, 2)
    runner = Runner(executable, signature, 2, Guards())
    result = runner(x, ids)
    assert result["logits"].shape == (0, 3)
    assert result["rest"][0].shape == (0,)
    assert result["rest"][1].dtype == np.int64
    assert executable.seen == []
    assert runner.stats()["samples"] == 0
    assert runner(torch.from_numpy(x), torch.from_numpy(ids))["logits"].shape == (0, 3)


def test_a_batch_of_zero_without_a_batch_dimension_in_an_output(fake: Any, simple: Any):
    runner = Runner(fake(lambda x: {"y": x[0]}, 2), simple(out=(3,)), 2)
    with pytest.raises(DataError, match=r"a batch of 0 samples has no output 'y'.*at least one"):
        runner(np.zeros((0, 3), np.float32))


def test_torch_in_torch_out(fake: Any, signature: Any, function: Any):
    x, ids = data(5)
    tensors = torch.from_numpy(x).requires_grad_(), torch.from_numpy(ids)
    result = Runner(fake(function, 2), signature, 2)(*tensors)
    logits, (score, top) = result["logits"], result["rest"]
    wanted = function(x, ids)
    assert (logits.dtype, score.dtype, top.dtype) == (torch.float32, torch.float32, torch.int64)
    assert logits.device == tensors[0].device
    assert not logits.requires_grad
    np.testing.assert_array_equal(logits.numpy(), wanted["logits"])
    np.testing.assert_array_equal(top.numpy(), wanted["top"])


def test_a_read_only_result_becomes_a_tensor_without_a_warning(fake: Any, simple: Any):
    def constant(x: Any) -> dict[str, Any]:
        y = np.array(x)
        y.flags.writeable = False
        return {"y": y}

    result = Runner(fake(constant, 2), simple(), 2)(torch.ones(2, 3))
    result += 1
    assert result.sum() == 12


@pytest.mark.parametrize("given", ["float16", "bfloat16", "float64"])
def test_floats_of_another_width_are_cast_and_results_have_the_original_type(
    fake: Any, simple: Any, given: Any
):
    executable = fake(lambda x: {"y": x}, 2)
    x = torch.tensor([[0.5, 1.0, 2.0]], dtype=getattr(torch, given))
    result = Runner(executable, simple(), 2)(x)
    assert executable.seen[0]["x"].dtype == np.float32
    assert result.dtype == torch.float32
    assert result.tolist() == [[0.5, 1.0, 2.0]]


def test_a_bfloat16_model_takes_and_gives_bfloat16(fake: Any, simple: Any):
    runner = Runner(fake(lambda x: {"y": x / 3}, 1), simple(dtype="bfloat16"), 1)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    assert runner(x).dtype == torch.bfloat16
    assert torch.equal(runner(x), x / 3)
    assert runner(x.float().numpy()).dtype == np.float32  # NumPy has no bfloat16


@pytest.mark.parametrize(
    ("declared", "given", "runs"),
    [
        ("int64", "int32", True),
        ("int64", "uint8", True),
        ("int64", "bool", True),
        ("int32", "int64", True),
        ("bool", "bool", True),
        ("float32", "int64", False),
        ("float32", "bool", False),
        ("int64", "float32", False),
        ("bool", "int64", False),
        ("bool", "float32", False),
    ],
)
def test_never_between_float_and_integer(
    fake: Any, simple: Any, declared: Any, given: Any, runs: Any
):
    executable = fake(lambda x: {"y": x}, 1)
    runner = Runner(executable, simple(dtype=declared), 1)
    x = np.ones((1, 3), dtype=given)
    if runs:
        assert runner(x).dtype == np.dtype(declared)
        assert executable.seen[0]["x"].dtype == np.dtype(declared)
        assert runner(torch.from_numpy(x)).dtype == getattr(torch, declared)
    else:
        with pytest.raises(
            DataError, match=f"input 'x': found {given}, wanted {declared}; convert"
        ):
            runner(x)


def test_complex_numbers_are_refused(fake: Any, simple: Any):
    with pytest.raises(DataError, match="input 'x': found complex64, wanted float32"):
        Runner(fake(lambda x: {"y": x}, 1), simple(), 1)(np.zeros((1, 3), np.complex64))


def test_integers_that_do_not_fit_are_refused(fake: Any, simple: Any):
    runner = Runner(fake(lambda x: {"y": x}, 1), simple(dtype="int32"), 1)
    with pytest.raises(DataError, match=f"found values from 0 to {2**31}, which do not fit int32"):
        runner(np.array([[0, 1, 2**31]]))
    assert runner(np.array([[0, 1, 2**31 - 1]]))[0, 2] == 2**31 - 1


@pytest.mark.parametrize("shape", [(2, 4), (2,), (3, 2), (2, 3, 1)])
def test_other_shapes_are_refused(fake: Any, simple: Any, shape: Any):
    runner = Runner(fake(lambda x: {"y": x}, 2), simple(), 2)
    with pytest.raises(DataError, match=r"input 'x': found shape \(.*\), wanted \(batch, 3\)"):
        runner(np.zeros(shape, np.float32))


def test_errors_call_inputs_as_the_caller_does(fake: Any, simple: Any):
    """A graph may have another name for an argument: torch.export has for one called input."""
    own = simple()
    inside = replace(own, inputs=(replace(own.inputs[0], name="x_1"),))
    runner = Runner(fake(lambda x: {"y": x}, 2), inside, 2)
    for bad in (np.zeros((2, 4), np.float32), np.zeros((2, 3), np.int64)):
        with pytest.raises(DataError, match="input 'x': found"):
            runner(bad)


def test_batches_must_agree(fake: Any, signature: Any, function: Any):
    runner = Runner(fake(function, 2), signature, 2)
    with pytest.raises(DataError, match=r"different batch sizes \{'x': 3, 'ids': 2\}, wanted one"):
        runner(data(3)[0], data(2)[1])
    assert runner.stats()["calls"] == 0


def test_an_input_without_a_batch_goes_to_every_chunk(simple: Any):
    class Executable:
        def run(self, inputs: Any) -> dict[str, Any]:
            assert inputs["x"].shape == (2, 3)
            assert inputs["t"].shape == (4,)
            return {"y": inputs["x"] + inputs["t"].sum()}

    leaf = Structure(kind="tensor")
    base = simple()
    spec = TensorSpec(name="t", dtype="float32", shape=(4,))
    signature = simple(
        inputs=(*base.inputs, spec), args=Structure(kind="tuple", children=(leaf, leaf))
    )
    x = data(5)[0]
    result = Runner(Executable(), signature, 2)(x, np.ones(4, np.float32))
    np.testing.assert_array_equal(result, x + 4)


def test_the_batch_may_be_another_dimension(simple: Any):
    class Executable:
        def run(self, inputs: Any) -> dict[str, Any]:
            assert inputs["x"].shape == (3, 2)
            return {"y": inputs["x"] * 2}

    x = data(5)[0].T
    result = Runner(Executable(), simple(shape=(3, None)), 2)(x)
    np.testing.assert_array_equal(result, x * 2)


def test_a_model_without_any_batch_runs_once(fake: Any, simple: Any):
    executable = fake(lambda x: {"y": x + 1}, None)
    runner = Runner(executable, simple(shape=(2, 3)), 1)
    np.testing.assert_array_equal(runner(np.zeros((2, 3), np.float32)), np.ones((2, 3)))
    assert (runner.stats()["chunks"], runner.stats()["samples"]) == (1, 1)


def test_an_output_without_a_batch_must_be_the_same_in_all_chunks(fake: Any, simple: Any):
    x = data(4)[0]
    constant = Runner(fake(lambda **_: {"y": np.float32([1, np.nan, 3])}, 2), simple(out=(3,)), 2)
    np.testing.assert_array_equal(constant(x), [1, np.nan, 3])
    mean = Runner(fake(lambda x: {"y": x.mean(axis=0)}, 2), simple(out=(3,)), 2)
    with pytest.raises(ShapeError, match="output 'y' has no batch dimension and differs"):
        mean(x)
    np.testing.assert_array_equal(mean(x[:2]), x[:2].mean(axis=0))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"z": np.zeros((2, 3))}, r"the build gave outputs \['z'\], wanted 'y' among them"),
        ({"y": np.zeros((1, 3))}, r"output 'y': the build gave shape \(1, 3\), wanted \(2, 3\)"),
    ],
)
def test_a_build_of_another_model_is_noticed(fake: Any, simple: Any, outputs: Any, message: str):
    with pytest.raises(BackendError, match=message):
        Runner(fake(lambda **_: outputs, 2), simple(), 2)(np.zeros((2, 3), np.float32))


def test_wrong_use_is_refused(fake: Any, simple: Any):
    with pytest.raises(ConfigError, match="built_batch: found 0, wanted at least 1"):
        Runner(fake(dict, 1), simple(), 0)
    with pytest.raises(
        ConfigError, match=r"tensor 'x': shape .* has more than one batch dimension"
    ):
        Runner(fake(dict, 1), simple(shape=(None, None)), 1)
    with pytest.raises(DataError, match="argument 'x' is missing"):
        Runner(fake(dict, 1), simple(), 1)()


def test_time_is_counted(fake: Any, simple: Any):
    ticks = count(0, 5_000_000)
    runner = Runner(fake(lambda x: {"y": x}, 2), simple(), 2, clock=lambda: next(ticks))
    for _ in range(3):
        runner(np.zeros((2, 3), np.float32))
    assert runner.stats()["total_ms"] == 15.0
    assert runner.stats()["last_ms"] == 5.0


RANGES = Ranges(inputs={"x": Range(low=-1.0, high=1.0)}, outputs={"y": Range(low=-10.0, high=10.0)})


def test_guards_reject_and_count(fake: Any, simple: Any):
    executable = fake(lambda x: {"y": x * 100}, 2)
    runner = Runner(executable, simple(), 2, Guards(), RANGES)
    with pytest.raises(GuardError, match="input 'x': found 1 NaN"):
        runner(np.float32([[0, np.nan, 0]]))
    with pytest.raises(GuardError, match="input 'x': 1 of 3 values lie outside"):
        runner(np.float32([[0, 2.5, 0]]))
    assert executable.seen == []
    with pytest.raises(GuardError, match="output 'y': 1 of 3 values lie outside"):
        runner(np.float32([[0, 1, 0]]))
    assert runner.stats()["rejected"] == 3
    assert runner.stats()["calls"] == 0
    runner(np.float32([[0, 0.1, 0]]))
    assert runner.stats()["calls"] == 1


def test_guards_clamp_and_count(fake: Any, simple: Any):
    executable = fake(lambda x: {"y": x * 100}, 1)
    runner = Runner(executable, simple(), 1, Guards(policy="clamp"), RANGES)
    result = runner(np.float32([[np.nan, 2.5, 0.1]]))
    np.testing.assert_array_equal(executable.seen[0]["x"], np.float32([[0, 2, 0.1]]))
    np.testing.assert_array_equal(result, np.float32([[0, 20, 10]]))
    assert runner.stats()["clamped"] == 3
    assert runner.stats()["rejected"] == 0


def test_only_the_callers_rows_are_guarded(fake: Any, simple: Any):
    """What padding makes of a row is nobody's business."""

    def last_row_overflows(x: Any) -> dict[str, Any]:
        y = x.copy()
        y[-1] = np.inf
        return {"y": y}

    runner = Runner(fake(last_row_overflows, 2), simple(), 2, Guards())
    assert runner(np.zeros((1, 3), np.float32)).shape == (1, 3)
    with pytest.raises(GuardError, match="output 'y': found 0 NaN and 3 infinite of 6"):
        runner(np.zeros((2, 3), np.float32))


def test_without_guards_anything_finite_or_not_passes(fake: Any, simple: Any):
    runner = Runner(fake(lambda x: {"y": x}, 1), simple(), 1, None, RANGES)
    x = np.float32([[np.nan, np.inf, 1e9]])
    np.testing.assert_array_equal(runner(x), x)


def test_a_float64_that_overflows_is_seen_by_the_guards(fake: Any, simple: Any):
    runner = Runner(fake(lambda x: {"y": x}, 1), simple(), 1, Guards())
    with pytest.raises(GuardError, match="input 'x': found 0 NaN and 1 infinite"):
        runner(np.array([[1e300, 0, 0]]))
