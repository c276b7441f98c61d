"""Two backends: each is measured, the better one is chosen, and either carries a model alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor.api.result import Result
from tersor.core.errors import BackendError, ConfigError
from tersor.price.price import PriceConfig
from tests.e2e.helpers import Recorded, quick_runs

pytest.importorskip("onnxruntime")
IMAGES = torch.randn(220, 3, 12, 12, generator=torch.Generator().manual_seed(1))
BOTH = ["onnxruntime", "openvino"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 48, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return Net().eval()


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_runs(PriceConfig(k=3, k_mixed=4, held_out=1)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.session.backend_names", lambda: BOTH)
        yield


def data() -> tersor.Data:
    return tersor.Data(
        calibration=IMAGES[:100], search=IMAGES[100:160], test=IMAGES[160:], output="values"
    )


def compressed(model: nn.Module, cache: Path, **options: object) -> tuple[Result, Recorded]:
    progress = Recorded()
    target = tersor.Target(size_ratio=2.0)
    return tersor.compress(
        model, data(), target=target, cache_dir=cache, progress=progress, **options
    ), progress


@pytest.fixture(scope="module")
def raced(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compressed(model, tmp_path_factory.mktemp("race"))[0]


def test_every_backend_is_among_the_uncompressed_builds(raced: Result) -> None:
    rows = raced.record.prices.baselines
    assert {row.choice.backend for row in rows if row.choice} == set(BOTH)
    assert raced.record.prices.baseline.choice is not None


def test_both_price_what_they_build(raced: Result) -> None:
    tables = raced.record.prices.tables
    assert tables
    assert {t.choice.backend for t in tables} <= set(BOTH)
    assert raced.plan.choice.backend in BOTH
    found, wanted = raced.model(IMAGES[:7]), raced.module(IMAGES[:7])
    assert torch.allclose(found, wanted, atol=0.1 * float(wanted.abs().max()))


def test_onnxruntime_alone_carries_a_model(model: nn.Module, tmp_path: Path) -> None:
    result, _ = compressed(model, tmp_path / "c", backend="onnxruntime")
    assert {r.choice.backend for r in result.record.prices.baselines if r.choice} == {"onnxruntime"}
    assert result.plan.choice.backend == "onnxruntime"
    assert result.verdict.size_bytes <= result.verdict.original_bytes / 2
    path = tmp_path / "net.tersor"
    result.save(path)
    found, wanted = tersor.load(path)(IMAGES[:7]), result.module(IMAGES[:7])
    assert torch.allclose(found, wanted, atol=0.1 * float(wanted.abs().max()))
    for name in ("net.onnx", "net.xml"):
        result.export(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0


def test_a_backend_that_fails_is_dropped_with_its_reason(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.backends.onnxruntime import ONNXRuntimeBackend

    def broken(*_: object) -> object:
        raise BackendError("onnxruntime: no kernel for this")

    monkeypatch.setattr(ONNXRuntimeBackend, "build", broken)
    result, progress = compressed(model, tmp_path)
    assert result.plan.choice.backend == "openvino"
    assert [n for n in progress.notes if "onnxruntime f32" in n and "no kernel for this" in n]
    with pytest.raises(BackendError, match="no kernel for this"):
        compressed(model, tmp_path, backend="onnxruntime")


def test_some_builds_that_fail_cost_no_table(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variant of the prices can't be built; the others make the table."""
    from tersor.api import stages

    whole, failed = stages._priced_build, []

    def sometimes(*args: object) -> object:
        if len(failed) == 2:
            failed.append(args)
            raise BackendError("not this one")
        failed.append(args)
        return whole(*args)

    monkeypatch.setattr(stages, "_priced_build", sometimes)
    result, progress = compressed(model, tmp_path, backend="openvino", methods="quantize")
    assert [n for n in progress.notes if "a build was dropped: not this one" in n]
    assert result.record.prices.tables


def test_an_unknown_backend_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backend is called 'magic'"):
        compressed(model, tmp_path, backend="magic")
