"""Plans that are measured as a pair: their ratio with its lower bound, kept for the pair."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tersor.api import choosing
from tersor.core.records import BuildChoice, Plan, Timing
from tersor.core.store import Store

PLAN = Plan(
    assignment={"fc": "int8_weight"},
    choice=BuildChoice(backend="own", precision="f32"),
    predicted_ms=1.0,
    predicted_bytes=1,
    predicted_error=0.0,
)
OTHER = replace(PLAN, assignment={"fc": "f32"})


def timing(*rounds: float) -> Timing:
    middle = sorted(rounds)[len(rounds) // 2]
    return Timing(
        median_ms=middle, low_ms=min(rounds), high_ms=max(rounds), rounds_ms=rounds, runs=9
    )


class Silent:
    def note(self, text: str) -> None:
        """Nothing is shown."""


class Session:
    """What a meter and its memory ask for."""

    key = "session"
    progress = Silent()

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose builds are names; the first plan takes 1.04 times the other, in five unsteady rounds."""
    found = object.__new__(choosing._Meter)
    found._session = Session(tmp_path)  # type: ignore[assignment]
    times = {"0": timing(1.00, 1.01, 1.04, 1.05, 1.06), "1": timing(1.0, 1.0, 1.0, 1.0, 1.0)}

    def calls(_self: Any, plans: Any) -> Mapping[str, Any]:
        return {str(i): p for i, p in enumerate(plans) if p.assignment["fc"] != "int8"}

    monkeypatch.setattr(choosing._Meter, "_calls", calls)
    monkeypatch.setattr(choosing, "measure_calls", lambda _s, made, _p: {n: times[n] for n in made})
    return found


def test_a_pair_has_its_ratio_and_a_lower_bound(meter: Any) -> None:
    found = meter.pair(PLAN, OTHER)
    assert found.times == pytest.approx(1.04)
    assert 1.0 <= found.least < 1.04


def test_what_can_not_be_built_is_no_pair(meter: Any) -> None:
    assert meter.pair(replace(PLAN, assignment={"fc": "int8"}), OTHER) is None


def test_a_pair_is_measured_once(meter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = object.__new__(choosing._Remembered)
    remembered._store, remembered._meter = meter._session.store, meter
    remembered._stamp, remembered._found = "stamp", {}
    first = remembered.beside(PLAN, OTHER)
    assert first[1] < first[0] == pytest.approx(1.04)
    monkeypatch.setattr(choosing._Meter, "pair", lambda *_: None)
    assert remembered.beside(PLAN, OTHER) == first
    assert remembered.beside(OTHER, PLAN) == (math.inf, math.inf)  # another pair, not built
