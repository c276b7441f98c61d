"""Replaced activations through a plan that names them: carried out, saved, explained, refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

import tersor
from tersor.api.result import Result
from tersor.api.session import Settings, open_session
from tersor.core.records import BuildChoice, Plan
from tersor.price.price import PriceConfig
from tests.e2e.helpers import error_of, quick_runs

LEVELS = {"act:gelu": "hardswish", "act:silu": "relu", "b": "int8"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(28, 64), nn.Linear(64, 28), nn.Linear(28, 64), nn.Linear(64, 8),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(gelu(self.a(x)))
        found: Tensor = self.d(silu(self.c(x)))
        return found


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_runs(PriceConfig(k=2, held_out=1)):
        yield


@pytest.fixture(scope="module")
def data(images: dict[str, Tensor]) -> tersor.Data:
    return tersor.Data([images["train"][:90, 0]], output="values")


@pytest.fixture(scope="module")
def result(data: tersor.Data, tmp_path_factory: pytest.TempPathFactory) -> Result:
    plan = Plan(
        assignment=LEVELS, choice=BuildChoice(backend="openvino"),
        predicted_ms=1.0, predicted_bytes=1, predicted_error=0.0,
    )  # fmt: skip
    return tersor.apply_plan(
        Net().eval(), data, plan, cache_dir=tmp_path_factory.mktemp("acts"), progress=False
    )


def test_the_plan_is_carried_out_and_saved(
    result: Result, images: dict[str, Tensor], tmp_path: Path
) -> None:
    ops = [str(n.target) for n in result.module.graph_module.graph.nodes]
    assert {"aten.hardswish.default", "aten.relu.default"} <= {*ops}
    assert not {"aten.gelu.default", "aten.silu.default"} & {*ops}
    x = images["test"][:20, 0]
    with torch.no_grad():
        wanted = Net().eval()(x)
    assert error_of([torch.as_tensor(result.model(x))], [wanted]) < 0.05
    result.save(tmp_path / "m.tersor")
    assert torch.equal(torch.as_tensor(tersor.load(tmp_path / "m.tersor")(x)), result.model(x))


def test_it_is_explained(result: Result) -> None:
    explained = result.explain("act:gelu")
    assert (explained["level"], explained["method"]) == ("hardswish", "activation")
    assert explained["error"] > 0
    assert explained["size_bytes"] == 0
    assert {a["level"] for a in explained["alternatives"]} == {"f32", "relu"}


def test_it_has_to_be_named(data: tersor.Data, tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, progress=False, methods=("quantize",))
    assert not open_session(Net().eval(), data, settings).activations
