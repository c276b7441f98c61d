"""Uncompressed builds that are measured: a choice that makes no build of its own costs none."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.api.session import Session, Settings, open_session
from tersor.api.stages import baselines
from tersor.backends.inductor import InductorBackend
from tersor.core.data import Data
from tersor.core.records import BaselineRow, FloatChoice
from tersor.price.price import PriceConfig
from tests.e2e.helpers import Recorded, brief_runs

X = torch.randn(60, 5, 16, generator=torch.Generator().manual_seed(0))
FLOATS = tuple(
    FloatChoice(precision="bf16", options={"mode": "eager", "blocks": b}) for b in ("ops", "fused")
)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + x


def measured(
    module: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sequence[BaselineRow], list[str], list[Any]]:
    """Rows, notes, and the choices that were built."""
    built: list[Any] = []
    plain = InductorBackend.build

    def build(self: InductorBackend, graph: Any, shapes: Any, choice: Any) -> Any:
        built.append(choice.options["blocks"])
        return plain(self, graph, shapes, choice)

    monkeypatch.setattr(InductorBackend, "build", build)
    progress = Recorded()
    data = Data(calibration=[X[:20]], search=[X[20:40]], test=[X[40:]], output="values")
    settings = Settings(
        backend="inductor", methods=("quantize",), cache_dir=folder, progress=progress
    )
    session: Session = open_session(module.eval(), data, settings)
    infos = tuple(replace(info, floats=FLOATS) for info in session.infos)
    with brief_runs(PriceConfig(k=3, k_mixed=4, held_out=1)):
        rows, _ = baselines(replace(session, infos=infos))
    return rows, progress.notes, built


def test_a_choice_that_changes_nothing_is_dropped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, notes, built = measured(Plain(), tmp_path, monkeypatch)
    assert {row.choice.options["blocks"] for row in rows if row.choice} == {"ops"}
    assert set(built) == {"ops"}
    found = [n for n in notes if "there is no narrow block and no narrow layer" in n]
    assert found
    assert all("blocks=fused" in n for n in found)


def test_one_that_changes_something_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, notes, built = measured(Residual(), tmp_path, monkeypatch)
    assert {row.choice.options["blocks"] for row in rows if row.choice} == {"ops", "fused"}
    assert set(built) == {"ops", "fused"}
    assert not [n for n in notes if "no narrow layer" in n]
