"""8-bit floats through the whole of compress, where a backend has them: prices, plan, file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.backends.inductor import InductorBackend
from tersor.core.records import BuildChoice, FloatChoice, FormatInfo, Plan, Prices
from tersor.price.price import PriceConfig
from tests.e2e.helpers import quick_runs

WIDTH, LONG, COUNT = 32, 6, 160


class Encoder(nn.Module):
    """Layers that read values of very different sizes, for whose small ones int8 steps are too coarse."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.down(nn.functional.relu(self.up(x.pow(5) / 30))))
        return result


@pytest.fixture(scope="module", autouse=True)
def _with_float8() -> Iterator[None]:
    """The CPU stands for a card that multiplies 8-bit floats; one quick way to build."""
    eager = (FloatChoice(precision="f32", options={"mode": "eager"}),)
    with quick_runs(PriceConfig(k=3, k_mixed=4, held_out=1)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(InductorBackend, "_float8", lambda *_: (FormatInfo(name="fp8"),))
        patch.setattr("tersor.backends.inductor.options.float_choices", lambda *_, **__: eager)
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def data() -> tersor.Data:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(COUNT, LONG, WIDTH, generator=generator)
    return tersor.Data(list(rows.split(16)), output="values")


def levels_of(prices: Prices) -> set[object]:
    """All levels that tables price."""
    rows = [level for table in prices.tables for row in table.ops.values() for level in row]
    terms = [v for t in prices.tables for term in t.terms for own in term.levels for v in own]
    return {*rows, *terms}


@pytest.mark.slow  # the parts have tests of their own
def test_layers_are_priced_in_the_format_of_eight_bits_that_errs_less(
    model: nn.Module, data: tersor.Data, tmp_path: Path
) -> None:
    result = tersor.compress(
        model, data, target=tersor.Target(size_ratio=2.0, min_agreement=0.5), backend="inductor",
        methods=("quantize",), cache_dir=tmp_path / "cache", progress=False,
    )  # fmt: skip
    levels = levels_of(result._run.prices)
    assert "fp8" in levels
    assert "int8" not in levels
    built = [b.assignment for t in result._run.prices.tables for b in t.builds]
    assert any(set(row.values()) >= {"fp8"} for row in built)


def test_a_plan_in_eight_bit_floats_goes_into_the_file_and_out_again(
    model: nn.Module, data: tersor.Data, tmp_path: Path
) -> None:
    choice = BuildChoice(backend="inductor", options={"mode": "eager"})
    plan = Plan(
        assignment={"up": "fp8", "down": "fp8", "head": "fp8", "width:up": 3 * WIDTH},
        choice=choice, predicted_ms=1.0, predicted_bytes=1, predicted_error=0.0,
        target={"size_ratio": 2.0},
    )  # fmt: skip
    result = tersor.apply_plan(model, data, plan, cache_dir=tmp_path / "cache", progress=False)
    result.save(tmp_path / "model.tersor")
    x = next(iter(data.iterable))
    with torch.no_grad():
        wanted = model(x)
    found = torch.from_numpy(np.asarray(tersor.load(tmp_path / "model.tersor")(x.numpy())))
    error = float((found - wanted).pow(2).sum() / wanted.pow(2).sum())
    assert error < 0.2  # a quarter of the units is gone
    types = {t.dtype for t in result.module.state_dict().values()}
    assert torch.float8_e4m3fn in types
    assert torch.int8 not in types
