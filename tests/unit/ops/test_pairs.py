"""Two maps fitted together: exact where that is possible, and never worse than before."""

import pytest
import torch
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.pairs import LinearPair, fit_pair


def drawn(c: int, seed: int, n: int = 5, m: int = 3) -> LinearPair:
    g = torch.Generator().manual_seed(seed)
    shapes = ((c, n), (c,), (m, c), (m,))
    return LinearPair(*(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes))


def run(pair: LinearPair, x: Tensor) -> Tensor:
    units = torch.relu(x @ pair.first_weight.T + pair.first_bias)
    return units @ pair.second_weight.T + pair.second_bias


X = torch.randn(2000, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_units_that_were_moved_find_back() -> None:
    truth = drawn(4, seed=0)
    moved = LinearPair(*(t + 0.1 * torch.randn_like(t) for t in truth.tensors()))
    found = fit_pair(X, run(truth, X), moved, torch.relu)
    assert found.before > 1e-3
    assert found.after < 1e-4 * found.before
    error = (
        run(LinearPair(*(t.double() for t in found.pair.tensors())), X) - run(truth, X)
    ).square()
    assert float(error.mean()) < 1e-4 * float(run(truth, X).var())


def test_losses_are_shares_of_the_variance_on_rows_never_fitted() -> None:
    truth, start = drawn(6, seed=1), drawn(3, seed=2)
    found = fit_pair(X, run(truth, X), start, torch.relu, iterations=20)
    unseen, y = X[::8], run(truth, X)
    for pair, loss in ((start, found.before), (found.pair, found.after)):
        off = run(LinearPair(*(t.double() for t in pair.tensors())), unseen) - y[::8]
        assert loss == pytest.approx(float(off.square().mean() / y.var(0).mean()), rel=1e-2)
    assert found.after < 0.5 * found.before


def test_what_helps_only_on_the_fitted_rows_is_dropped() -> None:
    g = torch.Generator().manual_seed(3)
    x, noise = X[:32], torch.randn(32, 3, generator=g, dtype=torch.float64)
    start = drawn(40, seed=4)
    quiet = LinearPair(*start.tensors()[:2], 0 * start.second_weight, noise.mean(0))
    found = fit_pair(x, noise, quiet, torch.relu)
    assert found.pair is quiet
    assert found.before == found.after


def test_what_was_given_stays() -> None:
    start = drawn(4, seed=5)
    before = [t.clone() for t in start.tensors()]
    fit_pair(X, run(drawn(4, seed=6), X), start, torch.relu, iterations=3)
    assert all(torch.equal(a, b) for a, b in zip(before, start.tensors(), strict=True))


def test_too_few_rows() -> None:
    with pytest.raises(ShapeError, match="found 15 rows, wanted at least 16"):
        fit_pair(X[:15], torch.zeros(15, 3), drawn(2, seed=7), torch.relu)
