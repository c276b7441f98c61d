"""The final build as native code for the file: taken where it is not slower, and the same when asked again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.backends.inductor import InductorBackend
from tersor.backends.openvino import OpenVINOBackend
from tersor.core import registry
from tersor.core.records import BuildChoice, Plan
from tersor.price.price import PriceConfig
from tersor.timing.protocol import Ratio
from tests.e2e.helpers import Recorded, close_logits, quick_runs

LINEARS = ("first", "middle", "last")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_runs(PriceConfig(k=2, k_mixed=3, held_out=1)):
        yield


class Ahead(OpenVINOBackend):
    """OpenVINO has no native code of its own: another way to build stands for it.

    A class of its own: whether a class has a method is asked once in a process, so that a method
    that is patched into another one would be there for good.
    """

    def for_file(self, choice: BuildChoice, best: BuildChoice) -> tuple[BuildChoice, ...]:
        del best
        if "int8_linear" in choice.options:
            return ()
        return (replace(choice, options={"int8_linear": "linear"}),)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(name: str, device: str) -> Ahead:
        assert (name, device) == ("openvino", "cpu")
        return Ahead()

    monkeypatch.setattr(registry, "backend", backend)


def carried_out(model: nn.Module, data: tersor.Data, plan: Plan, folder: Path) -> Any:
    progress = Recorded()
    result = tersor.apply_plan(model, data, plan, cache_dir=folder / "cache", progress=progress)
    return result, progress


def slower(speed: Ratio) -> bool:
    del speed
    return True


def plan_of(choice: BuildChoice) -> Plan:
    levels = dict.fromkeys(LINEARS, "f32")
    return Plan(
        assignment=levels,
        choice=choice,
        predicted_ms=1.0,
        predicted_bytes=1,
        predicted_error=0.0,
        target={"latency_ms": 1000.0},
    )


@pytest.mark.usefixtures("ahead", "never_slower")
@pytest.mark.parametrize("is_slower", [False, True])
def test_the_file_takes_what_is_not_slower(
    is_slower: bool,
    tiny: nn.Module,
    tiny_data: tersor.Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_slower:
        monkeypatch.setattr("tersor.api.final.is_slower", slower)
    else:
        monkeypatch.setattr("tersor.api.final.is_slower", lambda speed: not slower(speed))
    plan = plan_of(BuildChoice(backend="openvino"))
    result, progress = carried_out(tiny, tiny_data, plan, tmp_path)
    wanted = {} if is_slower else {"int8_linear": "linear"}
    assert dict(result.plan.choice.options) == wanted
    assert any("native code" in note for note in progress.notes) == is_slower
    # Asked again: what was chosen then, whatever a measurement would say now.
    monkeypatch.setattr("tersor.api.final.is_slower", slower)
    again, _ = carried_out(tiny, tiny_data, plan, tmp_path)
    assert again.plan == result.plan
    again.save(tmp_path / "again.tersor")
    assert dict(again.plan.choice.options) == wanted
    rows = torch.cat(list(tiny_data.iterable))
    assert close_logits(tersor.load(tmp_path / "again.tersor")(rows), tiny(rows).detach())


def test_what_is_compiled_for_a_file() -> None:
    backend = InductorBackend("cuda")
    plain = BuildChoice(
        backend="inductor", device="cuda", options={"mode": "compile", "graph": True}
    )
    searched = replace(plain, options={"mode": "autotune", "graph": True})
    eager = replace(plain, options={"mode": "eager"})
    package = {"mode": "package", "graph": True}
    assert [dict(c.options) for c in backend.for_file(plain, eager)] == [package]
    for choice, best in ((plain, searched), (searched, eager)):
        found = [dict(c.options) for c in backend.for_file(choice, best)]
        assert found == [package, {**package, "tuned": True}]
    assert not backend.for_file(replace(plain, options=package), searched)
    assert not backend.for_file(eager, searched)


@pytest.mark.usefixtures("never_slower")
def test_torch_runs_a_file_where_no_compiler_is(
    tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend inductor from a plan to a file; with a compiler a run takes minutes: see below."""
    monkeypatch.setattr("tersor.backends.inductor._COMPILERS", ())
    plan = plan_of(BuildChoice(backend="inductor", options={"mode": "eager"}))
    result, _ = carried_out(tiny, tiny_data, plan, tmp_path)
    assert result.plan.choice == plan.choice
    result.save(tmp_path / "eager.tersor")
    rows: Tensor = torch.cat(list(tiny_data.iterable))
    assert close_logits(tersor.load(tmp_path / "eager.tersor")(rows), tiny(rows).detach())


@pytest.mark.slow
@pytest.mark.usefixtures("never_slower")
def test_a_compiled_build_becomes_a_package(
    tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.api.final.is_slower", lambda speed: not slower(speed))
    plan = plan_of(BuildChoice(backend="inductor", options={"mode": "compile"}))
    result, _ = carried_out(tiny, tiny_data, plan, tmp_path)
    assert result.plan.choice.options["mode"] == "package"
    result.save(tmp_path / "native.tersor")
    rows: Tensor = torch.cat(list(tiny_data.iterable))
    assert close_logits(tersor.load(tmp_path / "native.tersor")(rows), tiny(rows).detach())
    with ZipFile(tmp_path / "native.tersor") as file:
        assert any("native.pt2" in name for name in file.namelist())
