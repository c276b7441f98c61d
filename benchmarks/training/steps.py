"""Forward and backward of one step: launch by launch, or recorded once and replayed."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]
WARM = 3  # passes before a recording: libraries choose their kernels there


class Eager:
    """Gradients of a loss, added to what there are."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Tensor) -> None:
        """Leave the gradients of this step in the parameters."""
        optimizer.zero_grad()
        self._loss(model, plan).backward()


class Recorded:
    """The same as a CUDA graph, recorded anew where parameters have other data (after a cut)."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._seen: list[tuple[int, torch.Size]] = []
        self._plan = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Tensor) -> None:
        """Leave the gradients of this step in the parameters: the graph writes over those before."""
        seen = [(p.data_ptr(), p.shape) for p in model.parameters()]
        lost = any(p.grad is None for p in model.parameters())
        if self._graph is None or lost or seen != self._seen:
            self._record(model, optimizer, plan)
            self._seen = seen
        assert self._graph is not None
        self._plan.copy_(plan)
        self._graph.replay()

    def _record(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Tensor) -> None:
        buffers = [(b, b.clone()) for b in model.buffers()]
        self._graph = None
        self._plan = plan.clone()
        torch.cuda.current_stream().synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                optimizer.zero_grad(set_to_none=True)
                self._loss(model, self._plan).backward()
            optimizer.zero_grad(set_to_none=True)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a graph of the run before that is freed while this one is recorded would end it
        with torch.cuda.graph(graph, stream=stream):
            self._loss(model, self._plan).backward()
        self._graph = graph
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
