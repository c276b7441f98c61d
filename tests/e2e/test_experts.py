"""compress where experts take part: those that nobody asks for go, and the file gets smaller."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.api.result import Result
from tersor.core.errors import ConfigError
from tersor.graph.edit import parameters_by_name
from tersor.price.price import PriceConfig
from tests.e2e.helpers import quick_runs

# Widths go through compress in test_pruning; experts have their own in tests/unit/propose and graph/axes.
pytestmark = pytest.mark.slow
TOKENS = torch.randn(220, 6, 16, generator=torch.Generator().manual_seed(1))
IDLE = (1, 4, 5)


class Mixture(nn.Module):
    """Tokens go to two of eight networks; three of these are nobody's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.router = nn.Linear(32, 8)
        self.up = nn.Parameter(0.3 * torch.randn(8, 48, 32))
        self.down = nn.Parameter(0.3 * torch.randn(8, 32, 48))
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            self.router.bias[list(IDLE)] = -30.0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).reshape(-1, 32)
        share, chosen = functional.softmax(self.router(rows), -1).topk(2, -1)
        tokens = rows.repeat_interleave(2, 0).unsqueeze(-1)
        hidden = torch.bmm(self.up[chosen.reshape(-1)], tokens).relu()
        found = torch.bmm(self.down[chosen.reshape(-1)], hidden).squeeze(-1)
        mixed = (found * share.reshape(-1, 1)).view(-1, 2, 32).sum(1)
        return self.head(mixed.view(-1, 6, 32).mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return Mixture().eval()


def data() -> tersor.Data:
    return tersor.Data(
        calibration=TOKENS[:100], search=TOKENS[100:160], test=TOKENS[160:], output="values"
    )


@pytest.fixture(scope="module")
def result(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    cache = tmp_path_factory.mktemp("experts")
    with quick_runs(PriceConfig(k=3, k_mixed=4, held_out=1)):
        yield tersor.compress(
            model,
            data(),
            target=tersor.Target(size_ratio=1.25, drop_points=0.5),
            methods=("prune",),
            cache_dir=cache,
            progress=False,
        )


def test_idle_experts_go_and_nothing_is_lost(result: Result) -> None:
    (site,) = (s for s in result.record.sites if s.unit_kind == "experts")
    assert result.plan.assignment[site.name] == 5
    assert result.verdict.agreement > 0.9999
    shapes = {n: tuple(t.shape) for n, t in parameters_by_name(result.module.graph_module).items()}
    assert (shapes["up"][0], shapes["down"][0], shapes["router.weight"][0]) == (5, 5, 5)


def test_the_plan_knows_the_bytes(result: Result) -> None:
    assert result.verdict.size_bytes == pytest.approx(result.plan.predicted_bytes, rel=0.05)
    checks = {c.name: c.status for c in result.verdict.checks}
    assert checks["size_ratio"] == "pass"


def test_the_file_computes_the_same(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "mixture.tersor"
    result.save(path)
    found, wanted = tersor.load(path)(TOKENS[:7]), result.module(TOKENS[:7])
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_experts_are_explained(result: Result) -> None:
    (site,) = (s for s in result.record.sites if s.unit_kind == "experts")
    told = result.explain(site.name)
    assert (told["kind"], told["level"], told["units"]) == ("width", 5, 8)
    assert min(a["level"] for a in told["alternatives"]) == 2  # as many as a token takes


def test_fewer_than_a_token_takes_are_refused(
    result: Result, model: nn.Module, tmp_path: Path
) -> None:
    (site,) = (s for s in result.record.sites if s.unit_kind == "experts")
    plan = replace(result.plan, assignment={**result.plan.assignment, site.name: 1})
    with pytest.raises(ConfigError, match="has no level 1, only 8, 7, 6, 5, 4, 3, 2"):
        tersor.apply_plan(model, data(), plan, cache_dir=tmp_path, progress=False)
