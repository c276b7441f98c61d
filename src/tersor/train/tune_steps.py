"""One training step, put together from what is switched on.

A recipe says how; a runner does it: move the batch, forward, backward, optimizer, gradients to
None. Nothing here reads a value back from the device, so that a GPU is never waited for.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.machine import describe_machine
from tersor.train.tune_batches import Pool, Signature, map_leaves, place, signature, tensors
from tersor.train.tune_update import UpdateGraph

LossOf = Callable[[nn.Module, Any], Tensor]
_WARM_UPS = 3  # before recording: libraries choose kernels and allocate in the first calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a device is and can.

    Attributes:
        name: The processor or the card.
        memory_bytes: All of its memory.
        cores: Of the processor that this process may use.
        has_bf16: Whether the device computes in bfloat16 (on a CPU: always, be it slowly).
        synchronize: Returns when the device has done all that it was given.
    """

    name: str
    memory_bytes: int
    cores: int
    has_bf16: bool
    synchronize: Callable[[], None]


def platform_of(device: torch.device) -> Platform:
    """Ask torch and the system."""
    machine = describe_machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return Platform(
            name=card.name,
            memory_bytes=card.total_memory,
            cores=machine.cores,
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            synchronize=lambda: torch.cuda.synchronize(device),
        )
    return Platform(
        name=machine.processor if device.type == "cpu" else device.type,
        memory_bytes=machine.memory_bytes,
        cores=machine.cores,
        has_bf16=True,
        synchronize=nothing if device.type == "cpu" else torch.accelerator.synchronize,
    )


def nothing() -> None:
    """A CPU's calls return when they are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the caller gave, checked.

    Attributes:
        step: Loss of one batch.
        source: The caller's loader or list.
        pool: Some of its batches.
        plain_seconds: Of a plain step; 0 until it was measured.
    """

    step: LossOf
    model: nn.Module
    optimizer: Optimizer
    source: Iterable[Any]
    device: torch.device
    platform: Platform
    pool: Pool
    steps: int | None = None
    scheduler: Any = None
    scaler: Any = None
    after_backward: Callable[[nn.Module], object] | None = None
    plain_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a step is made.

    Attributes:
        loss: The caller's function, or compiled from it.
        optimizers: Those whose ``step`` is called, in order.
        batches: Where batches come from.
        threads: On a CPU; 0: as they are.
        half: Forward under bfloat16 autocast.
        channels_last: Layout of images in a batch.
        fits: Signature of the batches that ``loss`` and ``graph`` are for; others take the caller's
            function. None: all.
        graph: Forward and backward, recorded.
        benchmark: cuDNN times its kernels for the record.
        update: The optimizer's step, recorded.
    """

    loss: LossOf
    optimizers: tuple[Optimizer, ...]
    batches: Iterable[Any]
    threads: int = 0
    half: bool = False
    channels_last: bool = False
    fits: Signature | None = None
    graph: "GradientGraph | None" = None
    benchmark: bool = False
    update: UpdateGraph | None = None


def plain(job: Job) -> Recipe:
    """The step as the caller would write it."""
    return Recipe(loss=job.step, optimizers=(job.optimizer,), batches=job.source)


def with_threads(count: int) -> AbstractContextManager[None]:
    """Some threads for a while; 0 leaves them as they are."""
    return _threads(count) if count and count != torch.get_num_threads() else nullcontext()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Runner:
    """One step on one batch."""

    def __init__(self, job: Job, recipe: Recipe, *, is_live: bool = False) -> None:
        """``is_live``: the scheduler takes part; while tuning it stays where it is."""
        self._job = job
        self._recipe = recipe
        self._scheduler = job.scheduler if is_live else None

    def __call__(self, batch: Any) -> Tensor:
        """Forward, backward, update; returns the loss, detached, on the device."""
        job, recipe = self._job, self._recipe
        with with_threads(recipe.threads):
            placed = place(batch, job.device, channels_last=recipe.channels_last)
            loss = self._gradients(placed)
            self._update()
        return loss

    def gradients(self, placed: Any) -> Tensor:
        """Forward and backward of a batch on the device."""
        job, recipe = self._job, self._recipe
        fits = recipe.fits is None or signature(placed) == recipe.fits
        loss_of = recipe.loss if fits else job.step
        if recipe.half:
            with torch.autocast(job.device.type, dtype=torch.bfloat16):
                loss = loss_of(job.model, placed)
        else:
            loss = loss_of(job.model, placed)
        (loss if job.scaler is None else job.scaler.scale(loss)).backward()
        return loss.detach()

    def _gradients(self, placed: Any) -> Tensor:
        graph = self._recipe.graph
        if graph is None:
            return self.gradients(placed)
        if signature(placed) == self._recipe.fits:
            return graph.replay(placed)
        graph.let_go()
        return self.gradients(placed)

    def _update(self) -> None:
        job, recipe = self._job, self._recipe
        if job.scaler is not None:
            self._scaled_update(job.scaler)
        else:
            if job.after_backward is not None:
                job.after_backward(job.model)
            if recipe.update is None or not recipe.update.replay():
                for optimizer in recipe.optimizers:
                    optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        if recipe.graph is None:  # its gradients are written anew by every replay
            for optimizer in recipe.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def _scaled_update(self, scaler: Any) -> None:
        job, optimizers = self._job, self._recipe.optimizers
        if job.after_backward is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            job.after_backward(job.model)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


class GradientGraph:
    """Forward and backward of one signature, recorded once on a CUDA stream and replayed.

    The optimizer's step stays outside, so that rates may change and a scaler may skip it. A replay
    reads the batch from fixed memory and writes gradients to fixed memory, anew each time.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, whole-network capture.
    """

    def __init__(
        self,
        gradients: Callable[[Any], Tensor],
        parameters: Iterable[Tensor],
        batch: Any,
        *,
        searches: bool = False,
    ) -> None:
        """Record.

        Args:
            gradients: Forward and backward of a batch; returns the loss.
            parameters: All that get gradients.
            batch: An example on the device; copied.
            searches: cuDNN times its kernels first, in a thread of its own, where it has chosen none yet.
        """
        self._parameters = tuple(parameters)
        self._batch = map_leaves(batch, lambda v: v.clone() if isinstance(v, Tensor) else v)
        self._inputs = tensors(self._batch)
        if searches:
            _searching(lambda: self._record(gradients), self._parameters[0].device)
        else:
            self._record(gradients)
        self._written = [(p, p.grad) for p in self._parameters if p.grad is not None]

    def _record(self, gradients: Callable[[Any], Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.let_go()
                gradients(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.let_go()
        # Where autocast is on around this call, copies of weights in 16 bits outlive the warm-ups, and a record
        # would read them for ever; those that it makes are no one else's.
        torch.clear_autocast_cache()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, as a loader's that pins memory, may go on while this one records.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = gradients(self._batch)
        torch.clear_autocast_cache()

    def let_go(self) -> None:
        """Gradients to None, for a step that is not replayed."""
        for parameter in self._parameters:
            parameter.grad = None

    def replay(self, batch: Any) -> Tensor:
        """The same work on another batch of the same signature."""
        for fixed, value in zip(self._inputs, tensors(batch), strict=True):
            fixed.copy_(value, non_blocking=True)
        for parameter, gradient in self._written:
            parameter.grad = gradient
        self._graph.replay()
        return self._loss.clone()


def _searching(call: Callable[[], None], device: torch.device) -> None:
    """With cuDNN's search, in a thread of its own, backward included; autocast is as it is here."""
    kind, flags = device.type, torch.backends.cudnn
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run() -> None:
        if kind == "cuda":
            torch.cuda.set_device(device)
        around = torch.autocast(kind, dtype=dtype) if is_on else nullcontext()
        with torch.autograd.set_multithreading_enabled(False), around:
            call()

    before, flags.benchmark = flags.benchmark, True
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
    finally:
        flags.benchmark = before
