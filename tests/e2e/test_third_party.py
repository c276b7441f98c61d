"""The method of docs/adding-a-method through its entry point: from ``compress`` to a file and a replay."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.result import Result
from tersor.artifact import read_artifact
from tersor.core import registry
from tersor.core.errors import ConfigError
from tersor.price.price import PriceConfig
from tests.e2e.helpers import quick_runs
from tests.third_party import DOCS, MODULE, PACKAGE, install

TARGET = tersor.Target(size_ratio=3.0)
LEVEL = "lut4_weight"


def network() -> nn.Module:
    found = nn.Sequential(
        nn.Linear(28, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 9)
    )
    generator = torch.Generator().manual_seed(0)
    for p in found.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return found.eval()


@pytest.fixture(scope="module")
def data(images: dict[str, Tensor]) -> tersor.Data:
    """One row of 90 images."""
    return tersor.Data([images["train"][:90, 0, 14]], output="values")


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site-packages")
    install(folder)
    with pytest.MonkeyPatch.context() as patch, quick_runs(PriceConfig(k=2, held_out=1)):
        patch.syspath_prepend(str(folder))
        yield
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def result(data: tersor.Data, tmp_path_factory: pytest.TempPathFactory) -> Result:
    found = tersor.compress(
        network(),
        data,
        target=TARGET,
        methods=("normalfloat",),
        cache_dir=tmp_path_factory.mktemp("third"),
        progress=False,
    )
    _ = found.verdict
    return found


def test_the_page_shows_what_is_run() -> None:
    page = (DOCS / "adding-a-method.md").read_text()
    code = (PACKAGE / f"{MODULE}.py").read_text()
    assert f"```python\n{code}```" in page
    assert f"```toml\n{(PACKAGE / 'pyproject.toml').read_text()}```" in page
    lines = [line.strip() for line in code.splitlines() if not line.strip().startswith('"""')]
    assert len([line for line in lines if line]) <= 40


def test_its_level_is_planned_carried_out_and_explained(result: Result) -> None:
    taken = {s for s, level in result.plan.assignment.items() if level == LEVEL}
    assert {"0", "2"} <= taken
    assert result.plan.methods == dict.fromkeys(taken, "normalfloat")
    assert not result.verdict.returned_baseline
    assert result.verdict.size_bytes <= result.verdict.original_bytes / TARGET.size_ratio
    assert result.verdict.size_bytes == pytest.approx(result.plan.predicted_bytes, rel=0.05)
    assert result.verdict.agreement > 0.9
    explained = result.explain("2")
    assert (explained["level"], explained["method"]) == (LEVEL, "normalfloat")
    assert [a["level"] for a in explained["alternatives"]] == ["f32"]


def test_the_file_holds_its_tables_and_needs_no_plug_in(
    result: Result, images: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.tersor"
    result.save(path)
    kinds = {p.packing.kind for p in read_artifact(path).packed.values()}
    assert kinds == {"table"}
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages0" not in p])
    assert "normalfloat" not in registry.names(registry.METHODS)
    x = images["test"][:16, 0, 14]
    assert torch.equal(tersor.load(path)(x), result.model(x))


def test_a_plan_is_replayed_by_the_method_that_it_names(
    result: Result, data: tersor.Data, images: dict[str, Tensor], tmp_path: Path
) -> None:
    """The method codebook has the same level, at a smaller error, and is not asked."""
    result.plan.save(tmp_path / "plan.json")
    again = tersor.apply_plan(
        network(), data, tmp_path / "plan.json", cache_dir=tmp_path, progress=False
    )
    assert "codebook" not in again._run.session.methods
    x = images["test"][:16, 0, 14]
    torch.testing.assert_close(again.module(x), result.module(x))


def test_it_has_to_be_named() -> None:
    from tersor.api.session import default_methods

    assert "normalfloat" in registry.names(registry.METHODS)
    assert "normalfloat" not in default_methods()


def test_a_plug_in_that_does_not_load_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    (info / "entry_points.txt").write_text("[tersor.methods]\nbroken = no_such_module:Method\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = r"'broken' of tersor-normalfloat 1.0 does not load from no_such_module:Method"
    with pytest.raises(ConfigError, match=wanted):
        registry.resolve(registry.METHODS, "broken")
