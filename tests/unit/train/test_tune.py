"""``tersor.train.tune`` from outside: training begins where it stood, and goes on as it would have."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import tersor.train
from tersor.core.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    NumericalError,
    ShapeError,
    TersorError,
)
from tersor.core.jsonable import from_json, to_json
from tersor.core.progress import Silent
from tersor.train.switches import ChannelsLast
from tersor.train.switches_cuda import CudaGraph, CudnnBenchmark
from tersor.train.tune import AUTOMATIC, FastStep, LossRule, TimeRule, TuneReport
from tersor.train.tune_checks import check_parts, chosen_names
from tersor.train.tune_session import Tuning
from tersor.train.tune_state import Randomness, seed_all
from tersor.train.tune_trials import Trials
from tests.unit.train.test_tune_state import picture, same
from tests.unit.train.tuning import batches, job, network, step, told

QUICK = {
    "loss_rule": LossRule(steps=10, seeds=3),
    "time_rule": TimeRule(rounds=3),
    "progress": False,
}
ROUNDING = 2e-5  # as in the tests of the switches
# Without compiling, which takes longer than all others together, and other numbers of threads,
# which wait for each other where other tests run beside this one; both have tests of their own.
CHEAP = [name for name in AUTOMATIC if name not in ("compile", "threads")]

QUICK_RULES = {name: value for name, value in QUICK.items() if name != "progress"}


@pytest.fixture
def by_a_clock() -> None:
    """Times are measured in this test."""


@pytest.fixture(autouse=True)
def known_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tried is faster, the more so the later it comes; but for one test by a clock."""
    if "by_a_clock" not in request.fixturenames:
        monkeypatch.setattr(sys.modules["tersor.train.tune"], "measure", told(10.0, 9.0, 8.0, 7.0))
        monkeypatch.setattr(Trials, "look", lambda _: 0.01)


def tuned(model: nn.Module | None = None, **changes: Any) -> Any:
    model = model or network()
    given: dict[str, Any] = {
        "step": step,
        "model": model,
        "optimizer": SGD(model.parameters(), 0.05, momentum=0.9),
        "batches": batches(),
        "switches": CHEAP,
        **QUICK,
        **changes,
    }
    return tersor.train.tune(given.pop("step"), **given)


def loader(seed: int = 0) -> DataLoader[Any]:
    x = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, torch.arange(40) % 3), batch_size=8, shuffle=True)


def plain_loop(model: nn.Module, optimizer: Any, source: Any, epochs: int = 2) -> list[float]:
    losses = []
    for _ in range(epochs):
        for batch in source:
            loss = step(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("is_begun", [False, True], ids=["fresh", "in training"])
def test_tuning_leaves_everything_as_it_was(is_begun: bool) -> None:
    randomness = Randomness.now()
    model = network()
    model[1].eval()  # a frozen batch norm
    optimizer = AdamW(model.parameters(), 1e-2)
    scheduler = StepLR(optimizer, 1, 0.5)
    source = loader()
    if is_begun:
        plain_loop(model, optimizer, source)
        scheduler.step()
    before, schedule = picture(model, optimizer), copy.deepcopy(scheduler.state_dict())
    identities = [id(p) for p in model.parameters()]
    fast = tuned(model, optimizer=optimizer, batches=source, scheduler=scheduler)
    after = picture(model, optimizer)
    flags = ("fused", "foreach")  # may have been switched on
    for found in (before, after):
        for group in found["state"]["param_groups"]:
            for name in flags:
                group.pop(name)
    assert same(after, before)
    assert scheduler.state_dict() == schedule
    assert [id(p) for p in model.parameters()] == identities
    assert fast.optimizers == (optimizer,)
    assert fast.report.steps_made > 3 * 10
    assert torch.get_num_threads() == fast.report.threads
    randomness.restore()


def test_the_tuned_step_trains_as_the_plain_loop_would() -> None:
    randomness = Randomness.now()
    seed_all(11)
    model = network()
    wanted = plain_loop(model, SGD(model.parameters(), 0.05, momentum=0.9), loader())
    seed_all(11)
    model, source = network(), loader()
    names = [n for n in CHEAP if n != "bf16"]  # which rounds more coarsely
    fast = tuned(model, batches=source, switches=names)
    found = [float(fast(batch)) for _ in range(2) for batch in fast.batches(source)]
    assert found == pytest.approx(wanted, rel=ROUNDING)
    assert all(p.grad is None for p in model.parameters())
    randomness.restore()


def test_without_switches_the_step_is_the_plain_one_exactly() -> None:
    randomness = Randomness.now()
    seed_all(4)
    model = network()
    wanted = plain_loop(model, SGD(model.parameters(), 0.05, momentum=0.9), batches())
    seed_all(4)
    fast = tuned(switches=[])
    found = [fast(batch) for _ in range(2) for batch in batches()]
    assert [float(f) for f in found] == wanted
    assert not any(f.requires_grad for f in found)
    assert fast.report.switches == ()
    assert fast.report.plain_ms == fast.report.tuned_ms > 0
    randomness.restore()


@pytest.mark.usefixtures("by_a_clock")
def test_the_report_says_of_every_switch_what_was_done_and_why() -> None:
    report = tuned().report
    assert {s.name for s in report.switches} == set(CHEAP)
    assert all(s.why for s in report.switches)
    (graph,) = [s for s in report.switches if s.name == "cuda_graph"]
    assert (graph.is_tried, graph.is_on) == (False, False)
    assert "CUDA" in graph.why
    (data,) = [s for s in report.switches if s.name == "resident_data"]
    assert "on cpu already" in data.why
    for row in report.switches:
        assert row.is_tried or not row.is_on
        if row.is_on:
            assert row.low is not None
            assert row.low > 1
            assert row.loss is not None
            assert row.loss.is_ok
    assert report.batch == "[8, 1, 6, 6] float32, [8] int64"
    assert to_json(from_json(TuneReport, to_json(report))) == to_json(report)


def test_an_earlier_report_is_repeated_without_measuring() -> None:
    task = job()
    tuning = Tuning(measure=told(10.0, 5.0, 5.0), **QUICK_RULES)
    _, report = tuning.tuned(task, ("channels_last", "fused_optimizer"))
    assert [s.label for s in report.on] == ["channels_last", "fused_optimizer (fused)"]
    again = tuned(switches=report)
    assert [s.label for s in again.report.on] == [s.label for s in report.on]
    assert again.optimizers[0].param_groups[0]["fused"] is True
    assert again.model[3].weight.stride() == (36, 1, 12, 4)
    assert again.report.steps_made < 10
    assert "report that was given" in again.report.notes[0]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    other = tuned(linear, switches=report)
    assert [s.label for s in other.report.on] == ["fused_optimizer (fused)"]


def test_a_sum_that_is_no_gain_is_not_kept() -> None:
    calls = []

    def measure(found: Any, protocol: Any) -> Any:
        calls.append(len(found))
        return told(*((10.0, 9.0) if len(calls) == 1 else (10.0, 10.1)))(found, protocol)

    task = job()
    recipe, report = Tuning(measure=measure, **QUICK_RULES).tuned(task, ("channels_last",))
    assert report.on == ()
    assert "only 0.99x as fast as the plain step" in report.switches[0].why
    assert not recipe.channels_last
    assert task.model[3].weight.is_contiguous()


def in_turn(times: Iterator[tuple[float, ...]]) -> Any:
    """A measurement that knows the times of each call beforehand."""

    def measured(calls: Any, protocol: Any) -> Any:
        return told(*next(times))(calls, protocol)

    return measured


@pytest.mark.parametrize(("recorded", "is_on"), [(4.0, True), (5.1, False)])
def test_what_was_slow_is_tried_again_once_the_step_is_recorded(
    monkeypatch: pytest.MonkeyPatch, recorded: float, is_on: bool
) -> None:
    """On a GPU that waits for launches most switches only gain where there are none."""
    monkeypatch.setattr(CudaGraph, "refusal", lambda *_: "")
    monkeypatch.setattr(CudaGraph, "apply", lambda _, __, recipe: recipe)
    times = iter([(10.0, 10.5), (10.0, 5.0), (5.0, recorded), (10.0, min(5.0, recorded))])
    task = job()
    tuning = Tuning(measure=in_turn(times), **QUICK_RULES)
    recipe, report = tuning.tuned(task, ("channels_last", "cuda_graph"))
    layout, graph = report.switches
    assert (layout.is_on, graph.is_on) == (is_on, True)
    assert layout.why.endswith("recorded; 0.95x before that")
    assert recipe.channels_last is is_on
    assert report.speedup == pytest.approx(2.5 if is_on else 2.0)
    assert next(times, None) is None


def test_what_gains_only_with_another_switch_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 bits are slow without channels last, and both are decided before the step is recorded."""
    monkeypatch.setattr(CudaGraph, "refusal", lambda *_: "")
    monkeypatch.setattr(CudaGraph, "apply", lambda _, __, recipe: recipe)
    before = [(10.0, 10.0), (10.0, 10.0), (10.0, 5.0)]  # 16 bits, channels last, recorded
    first, second = [(5.0, 6.0), (5.0, 4.5)], [(4.5, 3.0)]
    times = iter([*before, *first, *second, (10.0, 3.0)])
    rules = {**QUICK_RULES, "loss_rule": LossRule(steps=10, seeds=3, tolerance=0.5)}
    tuning = Tuning(measure=in_turn(times), **rules)
    recipe, report = tuning.tuned(job(), ("bf16", "channels_last", "cuda_graph"))
    assert [s.is_on for s in report.switches] == [True, True, True]
    assert recipe.half
    assert recipe.channels_last
    assert next(times, None) is None


@pytest.mark.parametrize("names", [("cudnn_benchmark",), ("cudnn_benchmark", "cuda_graph")])
def test_what_needs_a_record_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(CudaGraph, "refusal", lambda *_: "")
    monkeypatch.setattr(CudaGraph, "apply", lambda _, __, recipe: recipe)
    monkeypatch.setattr(CudnnBenchmark, "refusal", lambda *_: "")
    times = iter([(10.0, 5.0), (5.0, 4.0), (10.0, 4.0)] if len(names) > 1 else [])
    recipe, report = Tuning(measure=in_turn(times), **QUICK_RULES).tuned(job(), names)
    found = report.switches[0]
    assert recipe.benchmark is found.is_on is found.is_tried is (len(names) > 1)
    assert "a thread of its own" in found.why if len(names) == 1 else found.why.endswith("recorded")
    assert next(times, None) is None


def test_what_a_loss_spoke_against_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaGraph, "refusal", lambda *_: "")
    monkeypatch.setattr(CudaGraph, "apply", lambda _, __, recipe: recipe)
    monkeypatch.setattr(
        ChannelsLast,
        "apply",
        lambda _, job, recipe: replace(recipe, loss=lambda m, b: 2 * job.step(m, b)),
    )
    times = iter([(10.0, 9.0), (10.0, 5.0), (10.0, 5.0)])
    tuning = Tuning(measure=in_turn(times), **QUICK_RULES)
    _, report = tuning.tuned(job(), ("channels_last", "cuda_graph"))
    assert [s.is_on for s in report.switches] == [False, True]
    assert "the loss is off" in report.switches[0].why


def test_a_scheduler_is_stepped_by_the_result_alone() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 1.0)
    scheduler = StepLR(optimizer, 1, 0.5)
    fast = tuned(model, optimizer=optimizer, scheduler=scheduler, switches=["fused_optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1.0
    for batch in batches(3):
        fast(batch)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_gradients_are_given_out_before_the_optimizer_unscaled() -> None:
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=256.0)):
        norms: list[float] = []

        def clip(model: nn.Module, norms: list[float] = norms) -> None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))

        fast = tuned(switches=[], scaler=scaler, after_backward=clip)
        norms.clear()
        before = [p.detach().clone() for p in fast.model.parameters()]
        fast(batches(1)[0])
        assert 1e-3 < norms[0] < 20
        moved = [
            (p.detach() - b).norm() for p, b in zip(fast.model.parameters(), before, strict=True)
        ]
        assert float(torch.stack(moved).norm()) == pytest.approx(0.05 * 1e-3, rel=1e-3)
        if scaler is not None:
            assert scaler.get_scale() == 256.0


def test_hooks_of_the_optimizer_rest_while_tuning() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    fast = tuned(model, optimizer=optimizer, switches=["fused_optimizer"])
    assert calls == []
    assert any("1 step hooks" in note for note in fast.report.notes)
    fast(batches(1)[0])
    assert calls == [1]


def test_another_loader_is_kept_on_the_device_or_said_not_to_be() -> None:
    task, source = job(source=loader()), loader(1)
    tuning = Tuning(measure=told(10.0, 5.0), **QUICK_RULES)
    recipe, report = tuning.tuned(task, ("resident_data",))
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    fast = FastStep(task, recipe, report, Noting())
    assert fast.batches(task.source) is recipe.batches
    assert fast.batches(source) is fast.batches(source) is not recipe.batches
    assert notes == []
    ragged = [batches(1)[0]]
    assert [len(b) for b in fast.batches(ragged)] == [2]
    assert "on cpu already" in notes[0]


@pytest.mark.parametrize("is_training", [True, False])
def test_the_models_mode_is_kept_and_evaluation_is_noted(is_training: bool) -> None:
    model = network().train(is_training)
    fast = tuned(model, switches=["fused_optimizer"])
    assert model.training is is_training
    assert any("evaluation mode" in note for note in fast.report.notes) is not is_training


def test_parameters_that_nobody_trains_are_noted() -> None:
    model = network()
    fast = tuned(model, optimizer=SGD(model[0].parameters(), 0.1), switches=[])
    assert any("as 1.weight" in note for note in fast.report.notes)


# What can't be used


def returns(value: Any) -> Callable[..., Any]:
    return lambda model, batch: value(step(model, batch))


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (returns(Tensor.item), ConfigError, r"returned a float.*without \.item\(\)"),
        (returns(lambda _: None), ConfigError, "returned a NoneType, wanted the loss"),
        (returns(lambda v: v.expand(3)), ShapeError, r"shape \[3\], wanted one number"),
        (returns(lambda v: v.detach()), ConfigError, "its loss has no gradient"),
        (returns(lambda v: v * math.nan), NumericalError, "loss of the first batch is nan"),
        (returns(lambda v: v * math.inf), NumericalError, "loss of the first batch is inf"),
    ],
)
def test_a_step_without_a_loss_is_refused(bad: Any, kind: type[TersorError], message: str) -> None:
    with pytest.raises(kind, match=message):
        tuned(step=bad)


def frozen() -> nn.Module:
    return network().requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": SGD(network().parameters(), 0.1)}, "none of its 9 parameters is one of"),
        ({"steps": 0}, "found 0, wanted the number of steps"),
        ({"steps": True}, "found True"),
        ({"device": "cuda"}, r"found cuda, and the model is on cpu; move it first"),
        ({"scaler": 1}, "found int without"),
        ({"scheduler": 1}, "found int, wanted one with step"),
        ({"switches": "fast"}, "found 'fast', wanted 'auto'"),
        ({"switches": ["turbo"]}, "'turbo' is not known; known are"),
        ({"switches": ["fp8"]}, "fp8 is never switched on"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(**changes)


def test_parts_of_another_kind_are_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="found str, wanted step"):
        check_parts("no function", model, optimizer)
    with pytest.raises(ConfigError, match=r"found str, wanted an nn\.Module"):
        check_parts(step, "net", optimizer)
    with pytest.raises(ConfigError, match=r"found NoneType, wanted a torch\.optim\.Optimizer"):
        check_parts(step, model, None)
    with pytest.raises(ConfigError, match="found None, wanted 'auto'"):
        chosen_names(None, ("a",), ("b",))


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="are frozen"):
        tuned(frozen())


def test_a_lazy_model_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ConfigError, match="run it on one batch first"):
        tuned(model)


def test_optimizers_and_schedulers_that_need_more_are_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="LBFGS"):
        tuned(model, optimizer=LBFGS(model.parameters()))
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau waits for a metric"):
        tuned(model, optimizer=optimizer, scheduler=ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigError, match="drives another optimizer"):
        tuned(model, scheduler=StepLR(optimizer, 1))


def test_a_model_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="pass switches=report"):
        tuned()


@pytest.mark.parametrize("source", [[], iter([1])])
def test_batches_that_are_none_are_refused(source: Any) -> None:
    with pytest.raises(DataError):
        tuned(batches=source)


def test_schedule_free_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MissingDependencyError, match="pip install schedulefree"):
        tuned(switches=["schedule_free"])


def test_a_step_that_raises_leaves_the_model_as_it_was() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    count = 0

    def breaking(net: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        if count > 15:
            raise KeyError("the caller's own")
        return step(net, batch)

    with pytest.raises(KeyError, match="the caller's own"):
        tuned(model, step=breaking)
    assert count == 16
    assert same(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


def test_stages_and_decisions_are_told() -> None:
    told_: list[str] = []

    class Log:
        def stage(self, name: str, total: int | None = None) -> None:  # noqa: ARG002
            told_.append(f"# {name}")

        def advance(self, steps: int = 1) -> None:
            pass

        def note(self, text: str) -> None:
            told_.append(text)

        def close(self) -> None:
            told_.append("closed")

    report = tuned(progress=Log(), switches=["bf16", "cuda_graph"]).report
    assert told_[:3] == ["# plain step", "# losses of the plain step", "# bf16"]
    assert all(s.describe() in told_ for s in report.switches)
    assert report.lines()[-1] in told_
    assert "closed" in told_


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, tersor.train as t; assert 'torch' not in sys.modules;"
        "assert {'attach', 'tune'} <= set(dir(t)); f = t.tune; import tersor.train.tune; assert t.tune is f"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tersor.train.nothing
