"""compress where branches take part: replaced by maps, priced, kept and replayed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.proposing import Offers
from tersor.api.result import Result
from tersor.core.records import Site
from tersor.graph.contracts import SiteChange
from tersor.graph.edit import parameters_by_name
from tersor.price.price import PriceConfig
from tests.e2e.helpers import quick_runs

IMAGES = torch.randn(220, 3, 12, 12, generator=torch.Generator().manual_seed(1))
EVERY = ("depth", "prune", "quantize")


class Blocks(nn.Module):
    """Two branches: neurons that the output needs, and two maps that are one in truth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bent = nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1))
        self.straight = nn.Sequential(nn.Conv2d(16, 512, 1), nn.Conv2d(512, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.bent(x)
        x = x + self.straight(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return Blocks().eval()


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Few builds and few runs: what is measured does not matter here."""
    with quick_runs(PriceConfig(k=3, k_mixed=4, held_out=1)):
        yield


def data() -> tersor.Data:
    return tersor.Data(
        calibration=IMAGES[:100], search=IMAGES[100:160], test=IMAGES[160:], output="values"
    )


@pytest.fixture(scope="module")
def small(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Small enough only without one of the branches; which way it goes, measured times decide."""
    cache = tmp_path_factory.mktemp("small")
    target = tersor.Target(size_mb=0.05)
    return tersor.compress(
        model, data(), target=target, methods=("depth",), cache_dir=cache, progress=False
    )


@pytest.fixture(scope="module")
def result(small: Result, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The plan with the map in the straight branch's place, carried out."""
    plan = replace(small.plan, assignment={"branch:bent": 2, "branch:straight": 1})
    cache = tmp_path_factory.mktemp("depth")
    return tersor.apply_plan(model, data(), plan, cache_dir=cache, progress=False)


def test_a_branch_goes_where_the_size_asks_for_it(small: Result) -> None:
    assert small.plan.assignment["branch:straight"] in {0, 1}
    assert small.verdict.size_bytes <= 50_000
    # What the report in the file will take is not known before: a little more is expected.
    assert 0 <= small.plan.predicted_bytes - small.verdict.size_bytes < 2500


def test_a_branch_that_is_a_linear_map_loses_nothing(result: Result) -> None:
    assert result.verdict.agreement > 0.99999
    tensors = parameters_by_name(result.module.graph_module)
    assert {tuple(t.shape) for n, t in tensors.items() if n.startswith("straight")} == {
        (16, 16, 1, 1),
        (16,),
    }


def test_the_build_is_what_the_graph_computes(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "shallow.tersor"
    result.save(path)
    found, wanted = tersor.load(path)(IMAGES[:7]), result.module(IMAGES[:7])
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_branch_is_explained(result: Result) -> None:
    told = result.explain("branch:straight")
    assert (told["kind"], told["level"]) == ("branch", 1)
    assert {a["level"] for a in told["alternatives"]} >= {2, 0}


def test_changes_inside_of_what_goes_are_left_out() -> None:
    branch = Site(name="branch:b", kind="branch", ops=("x", "y"), units=2)
    layer, other = (
        Site(name=n, kind="format", ops=(n,), shape=(4, 4), size_bytes=64) for n in ("y", "z")
    )
    changes = {(s.name, level): SiteChange(site=s, level=level)
               for s, level in ((branch, 2), (branch, 1), (layer, "int8"), (other, "int8"))}  # fmt: skip
    offered = Offers(candidates=(), changes=changes, inside={"branch:b": ("y",)})
    whole = offered.chosen({"branch:b": 2, "y": "int8", "z": "int8"})
    assert ([c.site.name for c in whole.formats], whole.branches) == (["y", "z"], ())
    gone = offered.chosen({"branch:b": 1, "y": "int8", "z": "int8"})
    assert [c.site.name for c in (*gone.formats, *gone.branches)] == ["z", "branch:b"]


@pytest.mark.slow
def test_nothing_is_chosen_inside_of_what_goes(model: nn.Module, tmp_path: Path) -> None:
    result = tersor.compress(
        model,
        data(),
        target=tersor.Target(size_mb=0.05, drop_points=20.0),
        methods=EVERY,
        cache_dir=tmp_path,
        progress=False,
    )
    plan = result.plan.assignment
    assert set(plan) >= {"branch:bent", "branch:straight", "straight.0", "width:straight.0"}
    for branch in ("bent", "straight"):
        if plan[f"branch:{branch}"] != 2:
            assert plan[f"{branch}.0"] == plan[f"{branch}.2" if branch == "bent" else "straight.1"]
            assert plan[f"{branch}.0"] in {"f32", "bf16"}
            assert plan[f"width:{branch}.0"] == {"bent": 64, "straight": 512}[branch]
    edited = replace(result.plan, assignment={**plan, "branch:straight": 0, "straight.0": "int8"})
    again = tersor.apply_plan(model, data(), edited, cache_dir=tmp_path, progress=False)
    names = parameters_by_name(again.module.graph_module)
    assert not [n for n in names if n.startswith("straight")]
    found, wanted = again.model(IMAGES[:7]), again.module(IMAGES[:7])
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_depth_asks_to_be_named(model: nn.Module, tmp_path: Path) -> None:
    from tersor.api.session import Settings, open_session

    session = open_session(model, data(), Settings(cache_dir=tmp_path, progress=False))
    assert sorted(session.methods) == ["prune", "quantize"]
    assert session.branches == ()
