"""compress where heads lose directions: offered, priced, proven, fitted, told, saved and replayed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tersor
from tersor.api.result import Result
from tersor.graph.edit import parameters_by_name
from tersor.price.price import PriceConfig
from tests.e2e.helpers import Recorded, quick_runs
from tests.unit.attending import Attention
from tests.unit.capturing import random, scale_error, trained

# Widths go through compress in test_pruning; what is their own is in tests/unit/transform/test_heads.
pytestmark = pytest.mark.slow
X = random(120, 8, 64, seed=5)


def model() -> Attention:
    """Of one head, whose softmax is not saturated."""
    found = Attention(heads=1, size=64, inputs=64)
    trained(found, seed=3)
    with torch.no_grad():
        for tensor in (found.q.weight, found.k.weight):
            tensor.mul_(0.25)
    return found


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Few builds and few runs: what is measured does not matter here."""
    with quick_runs(PriceConfig(k=2, k_mixed=3, held_out=1)):
        yield


@pytest.fixture(scope="module")
def data() -> tersor.Data:
    return tersor.Data(calibration=[X[:60]], search=[X[60:90]], test=[X[90:]], output="values")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def progress() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def result(data: tersor.Data, store: Path, progress: Recorded) -> Result:
    """Without other formats than floats: what is to be smaller must lose dimensions."""
    return tersor.compress(
        model(),
        data,
        target=tersor.Target(size_ratio=1.4, min_agreement=0.3),
        methods=("prune",),
        cache_dir=store,
        progress=progress,
    )


def narrowed(result: Result) -> dict[str, tuple[int, int]]:
    units = {s.name: s.units for s in result.record.sites if s.unit_kind == "head_dim"}
    levels = {s: int(result.plan.assignment[s]) for s in units}
    return {s: (level, units[s]) for s, level in levels.items() if level != units[s]}


def test_heads_are_narrowed_by_directions(result: Result, progress: Recorded) -> None:
    cut = narrowed(result)
    assert cut
    assert {units for _, units in cut.values()} == {64}
    assert any("cutting equals zeroing" in note for note in progress.notes)
    shapes = {
        n: tuple(t.shape)
        for n, t in parameters_by_name(result.module.graph_module).items()  # type: ignore[arg-type]
    }
    for site, (kept, _) in cut.items():
        rows = shapes[f"{site.removeprefix('width:').partition(':')[0]}.weight"][0]
        assert rows == kept
    assert result.verdict.size_bytes == pytest.approx(result.plan.predicted_bytes, rel=0.05)


def test_it_is_told_and_saved(result: Result, tmp_path: Path) -> None:
    (site, (kept, units)), *_ = narrowed(result).items()
    told = result.explain(site)
    assert (told["kind"], told["level"], told["units"]) == ("width", kept, units)
    assert result.plan.settings[site]["directions"] in ("values", "scores")
    path = tmp_path / "m.tersor"
    result.save(path)
    with torch.no_grad():
        wanted: Tensor = result.module(X[:20])
    assert scale_error(tersor.load(path)(X[:20]), wanted) < 1e-4


def test_the_plan_is_replayed(result: Result, data: tersor.Data, tmp_path: Path) -> None:
    again = tersor.apply_plan(model(), data, result.plan, cache_dir=tmp_path, progress=False)
    assert narrowed(again) == narrowed(result)
    with torch.no_grad():
        torch.testing.assert_close(again.module(X[:9]), result.module(X[:9]), rtol=1e-3, atol=1e-2)
