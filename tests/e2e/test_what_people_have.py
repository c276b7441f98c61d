"""A model in half precision, an exported program and a .pt2 go the whole way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tersor
from tersor.cli.sources import load_model
from tersor.timing.protocol import Protocol
from tests.data.zoo import load_lenet5

TARGET = tersor.Target(size_ratio=1.5, min_agreement=0.9)


@pytest.fixture(scope="module")
def half_run(images: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 in bfloat16, compressed and saved."""
    folder = tmp_path_factory.mktemp("half")
    pictures = images["train"][:200].to(torch.bfloat16)
    data = tersor.Data(list(pictures.split(50)), output="logits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.stages.PRICING", Protocol(rounds=3, runs=3, max_seconds=3.0))
        result = tersor.compress(
            load_lenet5().to(torch.bfloat16),
            data,
            target=TARGET,
            methods=("quantize",),
            cache_dir=folder / "cache",
            progress=False,
        )
    assert result.verdict.agreement >= TARGET.min_agreement  # type: ignore[operator]
    result.save(folder / "half.tersor")
    return folder / "half.tersor"


@pytest.fixture(scope="module")
def program(images: dict[str, Tensor]) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return torch.export.export(load_lenet5().eval(), (images["train"][:2],), dynamic_shapes=shapes)


def test_a_half_model_keeps_its_types(half_run: Path, images: dict[str, Tensor]) -> None:
    runner = tersor.load(half_run)
    found = runner(images["test"][:5].to(torch.bfloat16))
    wanted = load_lenet5()(images["test"][:5])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_a_half_model_is_verified_and_exported(half_run: Path, tmp_path: Path) -> None:
    checks = tersor.verify(half_run, model=load_lenet5().to(torch.bfloat16)).checks
    by_name = {c.name: c for c in checks}
    assert by_name["build against graph"].status == "pass"
    assert by_name["agreement with the original"].found >= 0.75
    tersor.export(half_run, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size > 100_000


@pytest.mark.parametrize("way", ["program", "file"])
def test_programs_and_files_are_inspected_and_compared_with(
    way: str,
    program: torch.export.ExportedProgram,
    half_run: Path,
    images: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    model: Any = program
    if way == "file":
        torch.export.save(program, tmp_path / "model.pt2")
        model = load_model(str(tmp_path / "model.pt2"))
    found = tersor.inspect(model, images["train"][:2])
    assert {w.name: w.units for w in found.widths} == {"c1": 20, "c2": 50, "f1": 500}
    agreement = tersor.verify(half_run, model=model).checks[-1]
    assert agreement.name == "agreement with the original"
    assert agreement.found >= 0.75
