from collections.abc import Callable, Mapping
from types import ModuleType

import pytest

from tersor.core.errors import BackendError
from tersor.core.records import BackendInfo, BuildChoice, Timing
from tersor.price.baseline import (
    Baselines,
    BaselineTools,
    baseline_choices,
    measure_baselines,
    thread_settings,
)

INFO = BackendInfo(
    name="fake",
    available=True,
    precisions=("f32", "bf16"),
    choices=({"int8_linear": "linear"}, {"int8_linear": "convolution"}),
)


@pytest.mark.parametrize(
    ("cores", "settings"), [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (8, (1, 4, 8))]
)
def test_thread_settings(cores: int, settings: tuple[int, ...]) -> None:
    assert thread_settings(cores) == settings


def test_choices_are_precisions_by_threads() -> None:
    choices = baseline_choices(INFO, cores=8, batch=3)
    assert [(c.precision, c.threads) for c in choices] == [
        (p, n) for p in ("f32", "bf16") for n in (1, 4, 8)
    ]
    assert {c.batch for c in choices} == {3}
    assert all(c.options == {"int8_linear": "linear"} for c in choices)


class Clock:
    """Answers with given medians, one for the quick run and one for the careful one."""

    def __init__(
        self, lab: ModuleType, ms: Mapping[str, tuple[float, float]], spread: float
    ) -> None:
        self.lab, self.ms, self.spread = lab, {"eager": (9.0, 9.5), **ms}, spread
        self.asked: list[list[str]] = []

    def meter(self, stage: int) -> Callable[[Mapping[str, Callable[[], object]]], object]:
        def measure(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
            self.asked.append(list(calls))
            assert all(call() == name for name, call in calls.items())
            return {n: self.lab.timing(self.ms[n][stage], self.spread) for n in calls}

        return measure


def run(
    lab: ModuleType,
    ms: Mapping[str, tuple[float, float]],
    spread: float = 0.0,
    refuse: tuple[str, ...] = (),
) -> tuple[Baselines, Clock]:
    """Choices are named 'f32 1' and so on."""
    clock = Clock(lab, {describe(k): v for k, v in ms.items()}, spread)

    def build(choice: BuildChoice) -> Callable[[], object]:
        if f"{choice.precision} {choice.threads}" in refuse:
            raise BackendError("no such instruction")
        return choice.describe

    tools = BaselineTools(
        build=build,
        quick=clock.meter(0),
        careful=clock.meter(1),
        size_bytes=lambda choice: 400 if choice is None else 200,
        eager=lambda: "eager",
    )
    return measure_baselines([choice_of(k) for k in ms], tools), clock


def choice_of(key: str) -> BuildChoice:
    precision, threads = key.split()
    return BuildChoice(backend="fake", precision=precision, threads=int(threads))  # type: ignore[arg-type]


def describe(key: str) -> str:
    return choice_of(key).describe()


TIMES = {"f32 1": (8.0, 8.1), "f32 2": (5.0, 5.1), "bf16 1": (3.0, 3.3), "bf16 2": (3.1, 2.9)}


def test_the_best_of_the_careful_run_wins(lab: ModuleType) -> None:
    found, clock = run(lab, TIMES)
    assert found.rows[found.best].choice == choice_of("bf16 2")
    assert found.rows[found.best].timing.median_ms == 2.9
    assert found.reference() == describe("bf16 2")
    assert found.rows[0].name == "eager"
    assert found.rows[0].choice is None
    assert [r.size_bytes for r in found.rows] == [400, 200, 200, 200, 200]
    quick, careful = clock.asked
    assert quick == ["eager", *map(describe, TIMES)]
    assert careful == ["eager", describe("bf16 1"), describe("bf16 2"), describe("f32 2")]


def test_builds_of_another_run_are_not_compared(lab: ModuleType) -> None:
    # The machine is slower during the careful run: the fourth build's brief time looks best.
    times = {"f32 1": (3.4, 3.4), "f32 2": (3.3, 4.0), "bf16 1": (3.0, 3.6), "bf16 2": (3.2, 3.9)}
    found, _ = run(lab, times)
    assert found.rows[found.best].choice == choice_of("bf16 1")


def test_rows_of_the_slow_builds_keep_the_quick_run(lab: ModuleType) -> None:
    found, _ = run(lab, TIMES)
    by_name = {r.name: r.timing.median_ms for r in found.rows}
    assert by_name[describe("f32 1")] == 8.0
    assert by_name[describe("f32 2")] == 5.1
    assert by_name["eager"] == 9.5


def test_equal_within_noise_goes_to_fewer_threads(lab: ModuleType) -> None:
    times = {"bf16 1": (3.0, 3.05), "bf16 2": (3.0, 2.95), "bf16 4": (3.0, 2.9)}
    apart, _ = run(lab, times, spread=0.001)
    assert apart.rows[apart.best].choice.threads == 4
    equal, _ = run(lab, times, spread=0.03)
    assert equal.rows[equal.best].choice.threads == 1


def test_the_eager_model_is_never_the_best_build(lab: ModuleType) -> None:
    found, _ = run(lab, {"f32 1": (50.0, 50.0)})
    assert found.rows[found.best].choice == choice_of("f32 1")


def test_builds_that_fail_are_dropped_with_their_reason(lab: ModuleType) -> None:
    found, _ = run(lab, TIMES, refuse=("bf16 1", "bf16 2"))
    assert found.rows[found.best].choice == choice_of("f32 2")
    assert [(d.choice, d.reason) for d in found.dropped] == [
        (choice_of(k), "no such instruction") for k in ("bf16 1", "bf16 2")
    ]


def test_no_build_at_all(lab: ModuleType) -> None:
    with pytest.raises(BackendError, match=r"found no uncompressed build among 1 choices.*f32, 1"):
        run(lab, {"f32 1": (1.0, 1.0)}, refuse=("f32 1",))
