"""What is remembered is what the function would give, and no more of it stays than was agreed."""

import pytest
import torch
from torch import Tensor

from tersor.ops import remembered as module
from tersor.ops.damping import damped_inverse_upper
from tersor.ops.moments import Moments, centred
from tersor.ops.remembered import remembered
from tersor.ops.sweep import input_order, ordered_factor


class Counted:
    """A pure function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, factor: float = 1.0, *, extra: Moments | None = None) -> Tensor:
        self.calls += 1
        return x * factor + (0.0 if extra is None else extra.count)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def of(counted: Counted):  # type: ignore[no-untyped-def]
    @remembered
    def call(x: Tensor, factor: float = 1.0, *, extra: Moments | None = None) -> Tensor:
        return counted(x, factor, extra=extra)

    return call


def test_the_same_values_are_worked_out_once(counted: Counted) -> None:
    call, x = of(counted), torch.arange(3.0)
    first = call(x, 2.0)
    assert call(x.clone(), 2.0) is first
    assert counted.calls == 1
    torch.testing.assert_close(first, x * 2, rtol=0, atol=0)


def test_an_argument_that_was_overwritten_is_another_one(counted: Counted) -> None:
    call, x = of(counted), torch.arange(3.0)
    call(x)
    x[1] = 7
    torch.testing.assert_close(call(x), x, rtol=0, atol=0)
    assert counted.calls == 2


def test_types_settings_and_records_tell_arguments_apart(counted: Counted) -> None:
    call, x = of(counted), torch.arange(3.0)
    one, two = (
        Moments(count=c, xx=torch.zeros(1, 1, 1).double(), x=torch.zeros(1, 1).double())
        for c in (1, 2)
    )
    found = [
        call(x),
        call(x.double()),
        call(x, 3.0),
        call(x[:2]),
    ]
    assert [f.dtype for f in found] == [torch.float32, torch.float64, torch.float32, torch.float32]
    assert counted.calls == 4
    assert float(call(x, extra=one)[0]) == 1
    assert float(call(x, extra=two)[0]) == 2
    assert counted.calls == 6


def test_what_was_asked_for_last_stays(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_CALLS", 2)
    call = of(counted)
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    for x in (a, b, a, c, a):  # b is the one that has to go
        call(x)
    assert counted.calls == 3
    call(b)
    assert counted.calls == 4


def test_large_results_and_gradients_are_not_kept(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_VALUES", 5)
    call = of(counted)
    for x in (torch.zeros(3), torch.zeros(2, requires_grad=True)):
        call(x)
        call(x)
    assert counted.calls == 4


def test_factors_and_covariances_are_those_of_their_arguments() -> None:
    """A layer's second moment changes in one entry: nothing of the old one may come back."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    H = (rows.mT @ rows)[None]
    for change in (0.0, 1e-12, 1.0):
        H = H.clone()
        H[0, 0, 0] += change
        order = input_order(H, act_order=True)
        index = order[0]
        wanted, _ = damped_inverse_upper(H[:, index][:, :, index], 0.01)
        for _ in range(2):
            torch.testing.assert_close(ordered_factor(H, order, 0.01)[0], wanted, rtol=0, atol=0)
        moments = Moments(count=40, xx=H, x=rows.sum(0)[None])
        mean = moments.x / 40
        covariance = H / 40 - mean[:, :, None] * mean[:, None]
        for _ in range(2):
            torch.testing.assert_close(centred(moments)[0], covariance, rtol=1e-12, atol=1e-12)
