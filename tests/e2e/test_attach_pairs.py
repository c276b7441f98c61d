"""Pairs towards a target: prices of real builds with pairs in them decide which layers become one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.price.price import PriceConfig
from tersor.train.factorizer import Factorizer
from tersor.train.report import Report
from tersor.train.schedule import Schedule
from tests.e2e.helpers import quick_runs

STEPS = 40
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.5, every=4, epoch=4)


class Wide(nn.Module):
    """Two wide layers of low rank, in which a pair saves time and bytes, behind a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(32, 512)
        self.up = nn.Linear(512, 1024)
        self.down = nn.Linear(1024, 512)
        for layer in (self.up, self.down):
            rows, columns = layer.weight.shape
            with torch.no_grad():
                layer.weight.copy_(torch.randn(rows, 4) @ torch.randn(4, columns) / columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(torch.relu(self.narrow(x)))))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of prices, which are the same whatever the target is."""
    return tmp_path_factory.mktemp("pairs")


def trained(folder: Path, target: tersor.Target, **options: Any) -> tuple[nn.Module, Report]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wide()
        x = torch.randn(32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    with quick_runs(PriceConfig(k=4, k_mixed=4, held_out=1)):
        factorizer = tersor.train.attach(
            model,
            optimizer,
            x,
            target=target,
            total_steps=STEPS,
            algorithm="spectral",
            schedule=SCHEDULE,
            cache_dir=folder,
            progress=False,
            **options,
        )
        assert isinstance(factorizer, Factorizer)
        for _ in range(STEPS):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return factorizer.finish()


def test_a_speed_is_planned_from_measured_pairs_and_measured(store: Path, tmp_path: Path) -> None:
    # Who else uses the machine may take a core while builds are priced: each try has prices of its own.
    for folder in (store, tmp_path / "again", tmp_path / "once more"):
        small, report = trained(folder, tersor.Target(speedup=1.2))
        if {"up", "down"} & set(report.ranks()):
            break
    # Half a million weights of rank 4, twice: a pair is faster anywhere. Of the narrow layer's that
    # is for the machine to say.
    assert {"up", "down"} & set(report.ranks())
    assert report.predicted_ms is not None
    assert report.measured is not None
    assert report.measured.small_bytes < report.measured.dense_bytes
    for name, rank in report.ranks().items():
        assert small.get_submodule(name)[0].weight.shape[0] == rank
    whole = {row.layer: row.reason for row in report.factored if not row.rank}
    assert all(whole.values())
    assert "layers are pairs" in report.describe()


def test_a_size_needs_no_faster_pair(store: Path) -> None:
    _, report = trained(store, tersor.Target(size_ratio=3))
    assert report.parameters_after <= report.parameters_before / 3


def test_a_target_out_of_reach_takes_the_fastest_pairs_and_says_what_binds(store: Path) -> None:
    _, report = trained(store, tersor.Target(speedup=10_000))
    (note,) = [n for n in report.notes if "can't be met by pairs alone" in n]
    assert "latency binds" in note


def test_a_layer_whose_measured_pair_is_not_faster_stays_whole(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tersor.train.rank_planning.RankPlanner._slow",
        lambda self: {
            (c.site, c.level): "9.000 ms against 1.000 ms"
            for c in self.pricing.offers.candidates
            if c.site == "up" and "rank" in str(c.level)
        },
    )
    _, report = trained(store, tersor.Target(speedup=1.05))
    (up,) = [row for row in report.factored if row.layer == "up"]
    assert not up.rank
    assert up.reason == "no measured pair is faster: 9.000 ms against 1.000 ms"
