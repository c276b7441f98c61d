"""compress where ranks take part: offered, priced, chosen under a size, carried out, saved."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.result import Result
from tersor.core.rank_levels import RankLevel, is_eight_bit, rank_of
from tersor.price.price import PriceConfig
from tests.data.zoo import load_resnet20
from tests.e2e.helpers import Recorded, close_logits, error_of, quick_runs

# All but the last block: a few layers are quick to propose and to price.
KEEP = ("stem", "fc", *(f"layers.{i}" for i in range(8)))
METHODS = ("lowrank",)  # beside quantize's 4 and 3 bits, a search may well do without ranks
FREE = ("layers.8.conv1", "layers.8.conv2")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Few builds and few runs: what is measured does not matter here."""
    with quick_runs(PriceConfig(k=2, k_mixed=3, held_out=1)):
        yield


@pytest.fixture(scope="module")
def data(images: dict[str, Tensor]) -> tersor.Data:
    train, test = images["train"], images["test"]
    return tersor.Data(
        calibration=[train[:60]], search=[train[60:100]], test=[test[:40]], output="logits"
    )


@pytest.fixture(scope="module")
def progress() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def result(
    data: tersor.Data, progress: Recorded, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """The two free convolutions take 295 kB of the 1,080; 165 are left to them."""
    return tersor.compress(
        load_resnet20(),
        data,
        target=tersor.Target(size_mb=0.95, min_agreement=0.5),
        methods=METHODS,
        keep=KEEP,
        cache_dir=tmp_path_factory.mktemp("lowrank"),
        progress=progress,
    )


def test_a_size_that_formats_do_not_reach_takes_ranks(result: Result) -> None:
    levels = {site: result.plan.assignment[site] for site in FREE}
    assert any(rank_of(level) for level in levels.values()), levels
    assert result.verdict.size_bytes <= 950_000
    assert result.verdict.size_bytes == pytest.approx(result.plan.predicted_bytes, rel=0.02)
    assert result.verdict.agreement > 0.9


def test_the_graph_has_chains_where_the_plan_has_ranks(result: Result) -> None:
    names = {n.name: n for n in result.module.graph_module.graph.nodes}
    chained = [site for site, level in result.plan.assignment.items() if rank_of(level)]
    firsts = [n for n in names if n.endswith("_factor0")]
    assert len(firsts) == len(chained)
    for first in firsts:
        assert first.removesuffix("_factor0") in names  # the last op keeps the layer's name


def test_the_artifact_is_the_graph(
    result: Result, images: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "ranks.tersor"
    result.save(path)
    assert path.stat().st_size == pytest.approx(result.verdict.size_bytes, rel=0.01)
    batch = images["test"][:40]
    assert close_logits(tersor.load(path)(batch), result.module(batch))


def test_prices_of_ranks_are_tested_on_builds_that_no_fit_saw(result: Result) -> None:
    for table in result.record.prices.tables:
        for site in FREE:
            row = table.ops[site]
            assert any(rank_of(level) and not is_eight_bit(level) for level in row)
            assert all(ms >= 0 for ms in row.values())
        assert any(
            rank_of(level) for b in table.builds if b.held_out for level in b.assignment.values()
        )


def test_what_is_refused_says_why(result: Result) -> None:
    refused = {(r.site, r.level): r.reason for r in result.record.prices.refused}
    for (site, level), reason in refused.items():
        assert rank_of(level)
        assert result.plan.assignment[site] != level
        told = {a["level"]: a["note"] for a in result.explain(site)["alternatives"]}
        assert told[level] == f"refused: {reason}"


def test_a_plan_with_ranks_is_replayed(
    result: Result, tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path
) -> None:
    """Its ranks ask for the method by themselves."""
    levels = {"first": RankLevel("int8_rank8"), "middle": RankLevel("f32_rank8"), "last": "int8"}
    replace(result.plan, assignment=levels, settings={}).save(tmp_path / "plan.json")
    again = tersor.apply_plan(
        tiny, tiny_data, tmp_path / "plan.json", cache_dir=tmp_path / "cache", progress=False
    )
    assert again.plan.assignment == levels
    rows = torch.cat(list(tiny_data.iterable))
    found, wanted = again.model(rows), again.module(rows)
    assert error_of([torch.as_tensor(found)], [wanted]) < 1e-3
    assert [
        n.name for n in again.module.graph_module.graph.nodes if n.name.endswith("_factor0")
    ] == ["linear_factor0", "linear_1_factor0"]


def test_lowrank_asks_to_be_named(data: tersor.Data, tmp_path: Path) -> None:
    from tersor.api.session import Settings, open_session

    session = open_session(load_resnet20(), data, Settings(cache_dir=tmp_path, progress=False))
    assert "lowrank" not in session.methods
