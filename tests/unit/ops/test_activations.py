"""Cheaper activations: the functions, their best factor, and the refit of the layer behind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.ops.activations import FACTORS, best_factor, cheaper, refitted
from tests.unit.capturing import random

FLOAT = 1e-6  # roundings of float32 values of size one


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5.0))
def test_functions_by_their_definitions(seed: int, factor: float) -> None:
    x = 3 * random(40, seed=seed)
    for value, relu, hard in zip(
        x.tolist(), cheaper(x, "relu", factor), cheaper(x, "hardswish", factor), strict=True
    ):
        assert float(relu) == pytest.approx(max(value, 0.0))
        wanted = value * min(max(factor * value + 3, 0.0), 6.0) / 6
        assert float(hard) == pytest.approx(wanted, rel=1e-5, abs=FLOAT)


@pytest.mark.parametrize("factor", [0.8, 1.7, 3.2])
@pytest.mark.parametrize("has_reader", [False, True])
def test_the_factor_that_made_the_values_is_found(factor: float, has_reader: bool) -> None:
    x, weight = random(200, 6), random(3, 6, seed=1) if has_reader else None
    wanted = cheaper(x, "hardswish", factor)
    found, error = best_factor(x, wanted, weight, "hardswish")
    assert found == factor
    assert error < FLOAT


def test_no_other_factor_errs_less() -> None:
    x, weight = 2 * random(300, 8), random(4, 8, seed=1)
    wanted = torch.nn.functional.gelu(x)
    found, error = best_factor(x, wanted, weight, "hardswish")

    def by_definition(factor: float) -> float:
        moved = (cheaper(x, "hardswish", factor) - wanted).double() @ weight.double().T
        target = wanted.double() @ weight.double().T
        return float(moved.var(0).sum() / target.var(0).sum())

    errors = {factor: by_definition(factor) for factor in FACTORS}
    assert errors[found] == min(errors.values())
    assert error == pytest.approx(errors[found], rel=1e-4)
    assert 1.2 <= found <= 2.3  # what is known of GELU on normal values
    assert best_factor(x, wanted, weight, "relu")[1] > error


def test_a_refit_errs_less_on_rows_that_it_did_not_see() -> None:
    weight = random(5, 12, seed=1).double()
    mixed = random(4, 12, seed=5)  # values of a row tell of each other, as a layer's outputs do
    x, fresh = random(2000, 4) @ mixed, random(500, 4, seed=7) @ mixed
    gelu = torch.nn.functional.gelu
    new, shift, damping = refitted(torch.relu(x), gelu(x), weight)
    assert damping is not None

    def error(own: torch.Tensor, bias: torch.Tensor) -> float:
        off = torch.relu(fresh).double() @ own.T + bias - gelu(fresh).double() @ weight.T
        return float(off.square().mean())

    bias_only = (gelu(x).mean(0) - torch.relu(x).mean(0)).double() @ weight.T
    assert error(new, shift) < 0.95 * error(weight, bias_only) < 0.7 * error(weight, 0 * bias_only)


def test_nothing_changes_where_the_values_are_the_same() -> None:
    weight, x = random(5, 12, seed=1).double(), random(100, 12)
    new, shift, _ = refitted(x, x, weight)
    torch.testing.assert_close(new, weight)
    torch.testing.assert_close(shift, torch.zeros(5, dtype=torch.float64))


def test_values_that_never_change_have_no_error() -> None:
    assert best_factor(torch.zeros(9, 4), torch.zeros(9, 4), None, "hardswish") == (FACTORS[0], 0.0)


@pytest.mark.parametrize(("kind", "factor"), [("mish", 1.0), ("hardswish", 0.0)])
def test_other_functions_and_factors_are_refused(kind: str, factor: float) -> None:
    with pytest.raises(ConfigError, match=rf"{kind}.*wanted one of relu, hardswish"):
        cheaper(torch.zeros(2), kind, factor)
