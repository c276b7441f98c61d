"""The fewest samples that a message names are enough, and the size that is stated holds the file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor.core.data import SPLITS
from tersor.price.price import PriceConfig
from tests.e2e.helpers import quick_runs

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
WHOLE = tersor.Data([X], output="values")
PARTS = tersor.Data(calibration=[X[:1]], search=[X[1:2]], test=[X[2:]], output="values")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Few builds and few runs: what is measured does not matter here."""
    with quick_runs(PriceConfig(k=3, k_mixed=4, held_out=1)):
        yield


@pytest.mark.parametrize("data", [WHOLE, PARTS], ids=["whole", "parts"])
def test_one_sample_for_each_part(data: tersor.Data, tmp_path: Path) -> None:
    """One row a layer to calibrate with: one half of the samples is empty."""
    assert len(X) == len(SPLITS)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    result = tersor.compress(
        model,
        data,
        target=tersor.Target(size_ratio=1.5, min_agreement=0.9),
        methods=("quantize",),
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    verdict = result.verdict
    assert verdict.test_samples == 1
    assert set(result.plan.assignment.values()) & {"int8", "int8_weight"}
    result.save(path := tmp_path / "few.tersor")
    assert 0 <= verdict.size_bytes - path.stat().st_size <= 64
    check = next(c for c in verdict.checks if c.name == "size_ratio")
    assert check.found == verdict.original_bytes / verdict.size_bytes
