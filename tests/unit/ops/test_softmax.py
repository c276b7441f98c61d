"""The classifier for the original's probabilities: a minimum, never worse where it was not fitted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.softmax import Classifier, divergence, fit_softmax

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, rows: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that the inputs explain in part; the start is least squares on them."""
    x = normal(seed, rows, 5) + 0.5
    wanted = x @ normal(seed + 1, 5, 4) + 0.5 * normal(seed + 2, rows, 4)
    ones = torch.cat([x, torch.ones(rows, 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(ones, wanted).solution
    return x, wanted, solved[:5].T.contiguous(), solved[5].contiguous()


def by_hand(x: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The definition, in plain loops."""
    total = 0.0
    for row, logits in zip(x.tolist(), wanted, strict=True):
        p = logits.softmax(0)
        new = torch.stack([w @ torch.tensor(row, dtype=torch.float64) for w in weight]) + bias
        q = new.softmax(0)
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    return total / len(x)


@given(SEEDS, st.integers(16, 200), st.sampled_from([0.0, 1e-4, 1.0]))
@settings(max_examples=30, deadline=None)
def test_never_worse_on_rows_that_were_not_fitted(seed: int, rows: int, damping: float) -> None:
    x, wanted, weight, bias = problem(seed, rows)
    found = fit_softmax(x, wanted, weight, bias, damping=damping)
    assert found.after <= found.before
    assert found.before == pytest.approx(by_hand(x[::8], wanted[::8], weight, bias), rel=1e-9)
    assert found.after == pytest.approx(
        by_hand(x[::8], wanted[::8], found.weight, found.bias), rel=1e-9
    )


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_gradient_is_zero_at_what_is_found(seed: int) -> None:
    x, wanted, weight, bias = problem(seed, 400)
    found = fit_softmax(x, wanted, weight, bias, damping=0.0, iterations=400)
    if found.after == found.before:  # the start was kept
        return
    seen = torch.ones(len(x), dtype=torch.bool)
    seen[::8] = False
    free = Classifier(found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_())
    divergence(free, x[seen], wanted[seen].log_softmax(1)).backward()
    assert free.weight.grad is not None
    assert free.bias.grad is not None
    # The gradient at the start is of order 1e-2: what is left is rounding of a line search.
    assert float(free.weight.grad.abs().max()) < 1e-5
    assert float(free.bias.grad.abs().max()) < 1e-5


def test_it_gains_where_least_squares_spends_itself_on_hopeless_classes() -> None:
    x, wanted, _, _ = problem(3, 800)
    wanted[:, 0] = -30 - 30 * x[:, 1].square()  # never in question, and hard to imitate
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(ones, wanted).solution
    found = fit_softmax(x, wanted, solved[:5].T, solved[5])
    assert found.after < 0.9 * found.before  # 0.16 to 0.84 of it over six seeds, 0.36 of this one


def test_what_is_right_already_stays() -> None:
    x = normal(0, 64, 3)
    weight, bias = normal(1, 4, 3), normal(2, 4)
    found = fit_softmax(x, x @ weight.T + bias, weight, bias)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-9)
    assert found.before == pytest.approx(0, abs=1e-12)


def test_degenerate_rows_and_no_steps() -> None:
    x, wanted, weight, bias = problem(0, 32)
    assert fit_softmax(x, wanted, weight, bias, iterations=0).weight.equal(weight)
    still = fit_softmax(torch.ones(32, 5), wanted, torch.zeros(4, 5), torch.zeros(4))
    assert bool(still.weight.isfinite().all())
    one_class = fit_softmax(x, wanted[:, :1], weight[:1], bias[:1])
    assert one_class.after == one_class.before == 0.0


def test_wrong_use_is_named() -> None:
    x, wanted, weight, bias = problem(0, 32)
    with pytest.raises(ConfigError, match="damping=-1"):
        fit_softmax(x, wanted, weight, bias, damping=-1)
    with pytest.raises(ShapeError, match="found 15 rows, wanted at least 16"):
        fit_softmax(x[:15], wanted[:15], weight, bias)
    with pytest.raises(NumericalError, match="found NaN or infinity"):
        fit_softmax(x * float("nan"), wanted, weight, bias)
