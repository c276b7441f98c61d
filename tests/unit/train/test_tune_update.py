"""An optimizer's recorded step beside the step itself; on a CPU a record calls what it recorded."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from tersor.train.switches_cuda import CudaGraph, CudnnBenchmark, OptimizerGraph
from tersor.train.tune_arena import Arena
from tersor.train.tune_state import Snapshot
from tersor.train.tune_steps import plain
from tersor.train.tune_update import UpdateGraph, unrecordable
from tests.unit.train.tuning import batches, job, network, step

ROUNDING = 1e-6
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "plain sgd": lambda m: SGD(m.parameters(), 0.1),
    "adam": lambda m: Adam(m.parameters(), 0.01, amsgrad=True),
    "adamw": lambda m: AdamW([{"params": [p], "lr": 0.01} for p in m.parameters()]),
}


class Record:
    """Replays by doing the same again."""

    made: "list[Record]"

    def __init__(self) -> None:
        self.work: Callable[[], None] = lambda: None
        self.replays = 0
        Record.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.work()


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    Record.made = []

    @contextmanager
    def around(*_: Any, **__: Any) -> Any:
        yield

    for name, value in {
        "CUDAGraph": Record,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": around,
        "graph": around,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def with_gradients(model: nn.Module, seed: int = 0) -> None:
    """New values in the same memory."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(torch.randn(p.shape, generator=generator))


def fused(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def pair(kind: str) -> tuple[nn.Module, Optimizer, UpdateGraph, nn.Module, Optimizer]:
    """A model with a recorded optimizer at the start of its training, and its twin without."""
    model, twin = network(), network()
    optimizer, other = fused(MAKERS[kind](model)), fused(MAKERS[kind](twin))
    with_gradients(model)
    snapshot = Snapshot(model, optimizer)
    graph = UpdateGraph(optimizer)
    Record.made[-1].work = graph._step
    snapshot.restore()
    return model, optimizer, graph, twin, other


def close(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING) for a, b in pairs)


@pytest.mark.parametrize("kind", MAKERS)
def test_replays_train_as_steps_do_with_rates_that_change(kind: str) -> None:
    model, optimizer, graph, twin, other = pair(kind)
    schedules = [ExponentialLR(o, 0.5) for o in (optimizer, other)]
    for seed in range(4):
        with_gradients(model, seed)
        with_gradients(twin, seed)
        assert graph.replay()
        other.step()
        assert close(model, twin)
        for schedule in schedules:
            schedule.step()
    assert Record.made[-1].replays == 4
    assert all(type(g["lr"]) is float for g in optimizer.param_groups)
    assert not any(g.get("capturable") for g in optimizer.param_groups)


def test_a_loaded_state_is_followed() -> None:
    model, optimizer, graph, twin, other = pair("adam")
    other.param_groups[0].update(fused=None, foreach=False)  # a run that was not tuned
    for seed in range(3):
        with_gradients(twin, seed)
        other.step()
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    with_gradients(model, 7)
    with_gradients(twin, 7)
    assert graph.replay()
    other.step()
    assert close(model, twin)
    steps = [float(s["step"]) for s in optimizer.state.values()]
    assert steps == [4.0] * len(steps)


def other_gradient(model: nn.Module, _: Optimizer) -> None:
    p = next(model.parameters())
    p.grad = torch.zeros_like(p)


def one_more(_: nn.Module, optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize(
    "change",
    [
        lambda _, o: o.param_groups[0].update(weight_decay=0.5),
        lambda _, o: o.param_groups[0].update(momentum=0.5),
        lambda _, o: o.register_step_post_hook(lambda *_: None),
        lambda _, o: o.register_step_pre_hook(lambda *_: None),
        other_gradient,
        one_more,
    ],
)
def test_what_was_not_recorded_is_not_replayed(change: Callable[..., Any]) -> None:
    model, optimizer, graph, _, _ = pair("sgd")
    before = [p.detach().clone() for p in model.parameters()]
    change(model, optimizer)
    assert not graph.replay()
    assert Record.made[-1].replays == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_hooks_of_all_optimizers_are_called() -> None:
    _, _, graph, _, _ = pair("sgd")
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert not graph.replay()
    finally:
        handle.remove()
    assert graph.replay()


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.1), "dampening"),
        (lambda p: SGD(p, torch.tensor(0.1)), "are tensors"),
        (lambda p: Adagrad(p, 0.1), "Adagrad; recorded are SGD, Adam, AdamW"),
        (lambda p: Adam(p, 0.1, differentiable=True), "differentiable"),
        (lambda p: Adam(p, 0.1), ""),
    ],
)
def test_optimizers_that_can_be_recorded(optimizer: Callable[..., Optimizer], reason: str) -> None:
    found = unrecordable(optimizer(network().parameters()))
    assert reason in found
    assert bool(found) == bool(reason)


def test_the_switch_is_refused_where_gradients_move_or_a_scaler_decides() -> None:
    task = job()
    assert "not recorded" in OptimizerGraph().refusal(task, plain(task))
    recipe = CudaGraph().apply(task, plain(task))
    assert OptimizerGraph().refusal(task, recipe) == ""
    scaled = job(scaler=torch.amp.GradScaler("cpu"))
    recipe = CudaGraph().apply(scaled, plain(scaled))
    assert "GradScaler" in OptimizerGraph().refusal(scaled, recipe)


@pytest.mark.parametrize("is_fused", [False, True])
def test_the_switch_brings_fused_kernels_and_takes_them_back(is_fused: bool) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, fused=is_fused or None)
    task = job(model, optimizer)
    arena = Arena(task, Snapshot(model, optimizer), lambda: 0.0)
    record = CudaGraph()
    arena.enter((record,))
    Record.made[-1].work = lambda: with_gradients(model)
    switch = OptimizerGraph()
    assert switch.refusal(task, arena.recipe) == ""
    start = [p.detach().clone() for p in model.parameters()]
    arena.enter((record, switch))
    assert optimizer.param_groups[0]["fused"] is True
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert not optimizer.state
    graph = arena.recipe.update
    assert graph is not None
    Record.made[-1].work = graph._step
    arena.run(2)
    assert Record.made[-1].replays == 2
    arena.enter((record,))
    assert optimizer.param_groups[0]["fused"] is (is_fused or None)
    arena.enter((record, switch))  # the same record again
    arena.run(1)
    assert Record.made[-1].replays == 3
    arena.leave()
    assert optimizer.defaults["fused"] is (is_fused or None)


def test_an_odd_batch_takes_the_optimizers_own_step() -> None:
    task = job()
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    both = (CudaGraph(), OptimizerGraph())
    arena.enter(both[:1])
    Record.made[-1].work = lambda: with_gradients(task.model)
    assert both[1].refusal(task, arena.recipe) == ""
    arena.enter(both)
    before = [p.detach().clone() for p in task.model.parameters()]
    arena.on(batches(1, rows=3)[0])
    assert Record.made[-1].replays == 0
    assert not torch.equal(before[0], next(task.model.parameters()))


# cuDNN's search


def test_a_search_for_kernels_is_recorded_in_a_thread_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backward too: what a thread took for a shape it keeps."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append((get_ident(), torch.backends.cudnn.benchmark))
            return x.clone()

        @staticmethod
        def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append((get_ident(), torch.backends.cudnn.benchmark))
            return gradient

    def looked(model: nn.Module, batch: Any) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        assert not torch._C._is_multithreading_enabled()  # on a GPU backward has threads otherwise
        return Look.apply(step(model, batch).float())

    task = job(step=looked)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    recipe = CudnnBenchmark().apply(task, plain(task))
    with torch.autocast("cpu", torch.bfloat16):
        CudaGraph().apply(task, recipe)
    assert len(set(seen)) == 1
    assert seen[0][0] != get_ident()
    assert seen[0][1] is True
    assert len(seen) == 8  # three warm-ups and the record, forward and backward
    assert torch.backends.cudnn.benchmark is False


def test_a_step_that_fails_apart_fails_here_and_leaves_the_search_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    task = job(step=broken)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    recipe = CudnnBenchmark().apply(task, plain(task))
    with pytest.raises(RuntimeError, match="no kernel"):
        CudaGraph().apply(task, recipe)
    assert torch.backends.cudnn.benchmark is False


def test_where_the_search_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    task, card = job(), torch.device("cuda")
    assert "the step runs on cpu" in CudnnBenchmark().refusal(task, plain(task))
    linear = job(nn.Linear(3, 1), device=card)
    assert "no convolution" in CudnnBenchmark().refusal(linear, plain(linear))
    there = job(device=card)
    assert CudnnBenchmark().refusal(there, plain(there)) == ""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert "already" in CudnnBenchmark().refusal(there, plain(there))
