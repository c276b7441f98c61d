"""Each switch by itself: when it is refused, what it changes, and that it can be taken back."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from tersor.train.switches import (
    ChannelsLast,
    Compiled,
    Half,
    ResidentData,
    Switch,
    Threads,
    thread_counts,
)
from tersor.train.switches_cuda import CudaGraph
from tersor.train.switches_optimizer import FusedOptimizer
from tersor.train.tune_arena import Arena
from tersor.train.tune_batches import place, signature
from tersor.train.tune_state import Snapshot
from tersor.train.tune_steps import GradientGraph, Job, Runner, plain, platform_of
from tests.unit.train.tuning import batches, job, network, platform, step

# float32 sums of some hundred terms in another order, over a few steps.
ROUNDING = 2e-5


def train(task: Job, switches: tuple[Switch, ...], steps: int = 6) -> list[Tensor]:
    """Losses of some steps, and the parameters then, from the start of training."""
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    losses = arena.losses(switches, 0, 0, steps)
    found = [torch.tensor(losses), *(p.detach().clone() for p in task.model.parameters())]
    arena.leave()
    return found


def close(one: list[Tensor], other: list[Tensor], tolerance: float = ROUNDING) -> bool:
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(one, other, strict=True)
    )


def state_of(task: Job) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": task.model.state_dict(),
            "optimizer": task.optimizer.state_dict(),
            "strides": [p.stride() for p in task.model.parameters()],
            "defaults": task.optimizer.defaults,
        }
    )


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert one == other


@pytest.mark.parametrize(
    "make",
    [
        Half,
        ChannelsLast,
        lambda: Threads(2),
        lambda: FusedOptimizer("fused"),
        lambda: FusedOptimizer("foreach"),
    ],
)
def test_a_switch_trains_alike_and_leaves_no_trace(make: Callable[[], Switch]) -> None:
    task = job()
    for batch in task.pool.batches[:2]:  # in the middle of training: the optimizer has a state
        Runner(task, plain(task))(batch)
    before = state_of(task)
    identities = [id(p) for p in task.model.parameters()]
    wanted = train(task, ())
    switch = make()
    found = train(task, (switch,))
    half = 0.05  # bfloat16 has 8 bits
    assert close(wanted, found, half if isinstance(switch, Half) else ROUNDING)
    assert_same(state_of(task), before)
    assert [id(p) for p in task.model.parameters()] == identities


def test_the_comparison_above_would_tell_another_training() -> None:
    task = job()
    wanted = train(task, ())
    task.optimizer.param_groups[0]["lr"] = 0.06
    assert not close(wanted, train(task, ()))


# Channels last


def test_channels_last_moves_kernels_moments_and_gradients_alike() -> None:
    task = job(optimizer=None)
    optimizer = AdamW(task.model.parameters(), 1e-2)
    task = job(task.model, optimizer)
    Runner(task, plain(task))(task.pool.batches[0])
    kernel = task.model[3].weight
    arena = Arena(task, Snapshot(task.model, optimizer), lambda: 0.0)
    switch = ChannelsLast()
    arena.stay((switch,))
    assert kernel.stride() == (36, 1, 12, 4)
    assert optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()
    address = kernel.data_ptr()
    arena.enter(())
    assert kernel.is_contiguous()
    arena.enter((switch,))
    assert kernel.data_ptr() == address  # recorded work finds it again
    arena.step()
    assert optimizer.state[kernel]["exp_avg_sq"].stride() == kernel.stride()


def test_a_change_of_layout_keeps_the_values_of_the_moment() -> None:
    task, switch = job(), ChannelsLast()
    kernel = task.model[3].weight
    for value in (1.0, 2.0):
        kernel.data.fill_(value)
        switch.apply(task, plain(task))
        assert torch.equal(kernel.detach(), torch.full((4, 4, 3, 3), value))
        kernel.data.fill_(value + 10)
        switch.undo(task)
        assert kernel.is_contiguous()
        assert torch.equal(kernel.detach(), torch.full((4, 4, 3, 3), value + 10))


def test_a_state_that_is_loaded_later_follows_the_layout() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 1e-2, fused=True)
    task = job(model, optimizer)
    Runner(task, plain(task))(task.pool.batches[0])
    saved = copy.deepcopy(optimizer.state_dict())
    arena = Arena(task, Snapshot(model, optimizer), lambda: 0.0)
    arena.stay((ChannelsLast(),))
    optimizer.load_state_dict(saved)
    kernel = model[3].weight
    assert optimizer.state[kernel]["exp_avg"].stride() == kernel.stride() == (36, 1, 12, 4)
    arena.leave()
    optimizer.load_state_dict(saved)
    assert optimizer.state[kernel]["exp_avg"].is_contiguous()


def test_channels_last_needs_a_convolution() -> None:
    task = job(nn.Linear(3, 2))
    assert "no 2-D convolution" in ChannelsLast().refusal(task, plain(task))


# The optimizer's kernels


@pytest.mark.parametrize("choice", ["fused", "foreach"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        lambda p: Adam(p, 1e-2, amsgrad=True),
        lambda p: AdamW(p, 1e-2),
        lambda p: Adagrad(p, 1e-2),
    ],
)
def test_flags_are_changed_in_place_and_the_step_is_the_same(
    make: Callable[[Any], Optimizer], choice: str
) -> None:
    model = network()
    optimizer = make(model.parameters())
    task = job(model, optimizer)
    Runner(task, plain(task))(task.pool.batches[0])
    wanted = train(task, ())
    assert close(wanted, train(task, (FusedOptimizer(choice),)))
    arena = Arena(task, Snapshot(model, optimizer), lambda: 0.0)
    groups = optimizer.param_groups
    arena.stay((FusedOptimizer(choice),))
    assert optimizer.param_groups is groups
    assert groups[0][choice] is True
    assert optimizer.defaults[choice] is True
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is (choice == "fused")
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra]})
    assert groups[1][choice] is True


@pytest.mark.parametrize(
    ("make", "choice", "device", "reason"),
    [
        (RMSprop, "fused", "cpu", "RMSprop has no fused kernels"),
        (lambda p: SGD(p, 0.1, fused=True), "fused", "cpu", "it is on already"),
        (lambda p: SGD(p, 0.1, fused=True), "foreach", "cpu", "fused kernels are on already"),
        (lambda p: Adam(p, differentiable=True), "fused", "cpu", "differentiable"),
        (lambda p: SGD(p, 0.1), "foreach", "cuda", "torch takes them by itself"),
        (lambda p: SGD(p, 0.1), "fused", "cuda", ""),
        (lambda p: SGD(p, 0.1), "foreach", "cpu", ""),
    ],
)
def test_kernels_that_are_not_there_or_on_are_refused(
    make: Callable[[Any], Optimizer], choice: str, device: str, reason: str
) -> None:
    model = network()
    task = job(model, make(model.parameters()), device=torch.device(device))
    found = FusedOptimizer(choice).refusal(task, plain(task))
    assert reason in found
    assert bool(found) == bool(reason)


# Types


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": platform(has_bf16=False)}, "a test's machine does not compute in bfloat16"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "the step has a GradScaler"),
        ({"model": nn.Linear(2, 2).bfloat16()}, "parameters are in 16 bits already"),
        ({}, ""),
    ],
)
def test_half_precision_is_refused_where_the_step_has_its_own(
    changes: dict[str, Any], reason: str
) -> None:
    task = job(**changes)
    found = Half().refusal(task, plain(task))
    assert reason in found
    assert bool(found) == bool(reason)


def test_half_precision_is_refused_inside_of_autocast() -> None:
    task = job()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in Half().refusal(task, plain(task))


def test_half_precision_reaches_the_step() -> None:
    seen = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch[1])

    task = job(step=watched)
    Runner(task, Half().apply(task, plain(task)))(task.pool.batches[0])
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in task.model.parameters())


# Threads


def test_threads_are_for_the_step_alone() -> None:
    outside = torch.get_num_threads()
    seen = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return step(model, batch)

    task = job(step=watched)
    Runner(task, Threads(outside + 1).apply(task, plain(task)))(task.pool.batches[0])
    assert seen == [outside + 1]
    assert torch.get_num_threads() == outside


def test_numbers_of_threads_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert thread_counts(8) == [1, 4]
    assert thread_counts(16) == [1, 16]
    assert thread_counts(1) == [1]
    task = job()
    assert Threads(8).refusal(task, plain(task)) == "as it is"
    assert Threads(4).refusal(task, plain(task)) == ""
    on_gpu = job(device=torch.device("cuda"))
    assert "runs on a GPU" in Threads(4).refusal(on_gpu, plain(on_gpu))


# Data on the device


def test_resident_data_gives_the_loaders_batches() -> None:
    data = TensorDataset(torch.arange(24.0).reshape(12, 2), torch.arange(12))
    loader = DataLoader(
        data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    task = job(nn.Linear(2, 3), source=loader)
    switch = ResidentData()
    assert switch.refusal(task, plain(task)) == ""
    assert switch.gives_the_same(task)
    assert switch.apply(task, plain(task)).batches is not loader
    switch._batches = [[x + 1, y] for x, y in loader]
    assert not switch.gives_the_same(task)


def test_resident_data_stays_within_its_share_of_memory() -> None:
    data = batches(4)
    bytes_needed = sum(t.numel() * t.element_size() for b in data for t in b)
    meta = torch.device("meta")
    enough, short = bytes_needed * 5, bytes_needed * 5 - 5  # a fifth of it
    for memory, reason in ((enough, ""), (short, "more than the")):
        task = job(source=data, device=meta, platform=platform(memory_bytes=memory))
        found = ResidentData().refusal(task, plain(task))
        assert reason in found
        assert bool(found) == bool(reason)


# Compiling


def test_compiling_is_refused_where_shapes_change_or_the_run_is_over_first() -> None:
    dynamic = job(source=[*batches(2), *batches(1, rows=5), *batches(1, rows=4)])
    found = Compiled().refusal(dynamic, plain(dynamic))
    assert "3 different ones in 4 batches" in found
    short = job(steps=10, plain_seconds=0.49)
    assert "10 steps takes 4.9 s" in Compiled().refusal(short, plain(short))
    assert Compiled().refusal(job(steps=100, plain_seconds=0.5), plain(short)) == ""
    assert Compiled().refusal(job(plain_seconds=0.5), plain(short)) == ""


def test_compiled_code_gets_only_the_batches_that_it_is_for() -> None:
    calls = []

    def compiled(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return step(model, batch)

    task = job()
    switch = Compiled()
    switch._compiled = compiled
    run = Runner(task, switch.apply(task, plain(task)))
    for rows in (8, 5, 8):
        assert run(batches(1, rows=rows)[0]).isfinite()
    assert calls == [8, 8]


def test_what_was_compiled_again_is_complained_of() -> None:
    switch = Compiled()
    assert switch.complaint() == ""
    switch.ready()
    assert "nothing to compile" in switch.complaint()
    switch._graphs = 2
    switch.ready()
    assert switch.complaint() == ""
    switch._graphs = 5
    assert "3 more compilations" in switch.complaint()


@pytest.mark.slow
def test_the_compiled_step_trains_alike() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    data = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(4)]
    task = job(model, SGD(model.parameters(), 0.1), data)
    wanted = train(task, ())
    switch = Compiled()
    assert close(wanted, train(task, (switch,)))
    assert switch._graphs == 1
    switch.ready()
    train(task, (switch,))
    assert switch.complaint() == ""


# CUDA graphs: refusals here, and the flow on a stand-in that records calls in place of kernels


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "the step runs on cpu"),
        ({"device": torch.device("cuda"), "source": [*batches(1), *batches(1, rows=3)]}, "shapes"),
        ({"device": torch.device("cuda"), "source": [(torch.ones(2), object())]}, "holds a object"),
        ({"device": torch.device("cuda")}, ""),
    ],
)
def test_recording_is_refused_where_it_can_not_be(changes: dict[str, Any], reason: str) -> None:
    task = job(**changes)
    found = CudaGraph().refusal(task, plain(task))
    assert reason in found
    assert bool(found) == bool(reason)


class FakeGraph:
    """Replays what was called while it recorded, into the memory that was written then."""

    def __init__(self) -> None:
        self.work: Callable[[], None] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


class FakeStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    @contextmanager
    def nothing_around(*_: Any, **__: Any) -> Any:
        yield

    @contextmanager
    def recording(graph: FakeGraph, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        made.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nothing_around)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return made


def test_a_recorded_step_reads_fixed_inputs_and_writes_fixed_gradients(
    fake_cuda: list[FakeGraph],
) -> None:
    model = nn.Linear(3, 1)
    parameters = list(model.parameters())
    calls = []

    def gradients(batch: Any) -> Tensor:
        calls.append(id(batch[0]))
        loss = model(batch[0]).square().mean()
        loss.backward()
        return loss.detach()

    example = (torch.ones(4, 3), "label")
    graph = GradientGraph(gradients, parameters, example)
    assert len(calls) == 4  # three warm-ups, one that was recorded
    assert len(set(calls)) == 1
    assert calls[0] != id(example[0])
    written = [p.grad for p in parameters]

    def work() -> None:
        fresh = torch.autograd.grad(model(graph._batch[0]).square().mean(), parameters)
        for place_, value in zip(written, fresh, strict=True):
            place_.copy_(value)
        graph._loss.copy_(model(graph._batch[0]).square().mean().detach())

    fake_cuda[0].work = work
    other = torch.arange(12.0).reshape(4, 3)
    graph.let_go()
    first = graph.replay((other, "label"))
    wanted = model(other).square().mean()
    assert torch.equal(first, wanted.detach())
    assert all(p.grad is g for p, g in zip(parameters, written, strict=True))
    expected = torch.autograd.grad(wanted, parameters)
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))
    second = graph.replay((torch.zeros(4, 3), "label"))
    assert not torch.equal(first, second)  # a loss that was given out does not change any more


def test_a_batch_that_does_not_fit_the_record_is_stepped_as_usual(
    fake_cuda: list[FakeGraph],
) -> None:
    model = nn.Linear(3, 1)
    data = [torch.randn(4, 3), torch.randn(4, 3)]
    task = job(
        model, SGD(model.parameters(), 0.0), data, step=lambda net, x: net(x).square().mean()
    )
    recipe = CudaGraph().apply(task, plain(task))
    run = Runner(task, recipe)
    run(data[1])
    assert fake_cuda[0].replays == 1
    recorded = model.weight.grad
    assert recorded is not None  # stays: the next replay writes it
    odd = torch.randn(2, 3)
    (wanted,) = torch.autograd.grad(model(odd).square().mean(), [model.weight])
    for _ in range(3):
        run(odd)
        assert torch.equal(model.weight.grad, wanted)  # of this batch alone: they do not add up
    assert fake_cuda[0].replays == 1
    run(data[0])
    assert fake_cuda[0].replays == 2
    assert model.weight.grad is recorded
    assert signature(place(odd, task.device)) != recipe.fits


def test_the_platform_of_a_cpu() -> None:
    found = platform_of(torch.device("cpu"))
    assert found.memory_bytes > 0
    assert found.cores >= 1
    assert found.has_bf16
    found.synchronize()


def test_the_platform_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name = "a card"
        total_memory = 80 * 10**9

    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    found = platform_of(torch.device("cuda:1"))
    assert (found.name, found.memory_bytes, found.has_bf16) == ("a card", 80 * 10**9, False)
    found.synchronize()
    assert asked == [torch.device("cuda:1")]
