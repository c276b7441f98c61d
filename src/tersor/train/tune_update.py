"""An optimizer's step, recorded: what the host writes down once, a GPU repeats by itself."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Their fused kernels read the rate from memory, and their state begins with zeros.
KINDS = (SGD, Adam, AdamW)
# The rate may change, the others say nothing about a step that is recorded: a state that is loaded brings
# the flags of the run that it is of.
_FREE = ("params", "lr", "initial_lr", "fused", "foreach", "capturable")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OF_ALL = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)  # of every optimizer


class UpdateGraph:
    """The fused step of an optimizer on gradients that stay where they are.

    Rates are copied to fixed memory where they changed. Whatever else differs from the time of recording (other
    gradients, weight decay, momentum, parameters, hooks) is a reason not to replay.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Record. Parameters and the optimizer's state are a step further on afterwards.

        Args:
            optimizer: One of ``KINDS`` with fused kernels on, whose parameters have the gradients
                that every replay reads.
        """
        self._optimizer = optimizer
        self._gradients = [
            (p, p.grad)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        device = self._gradients[0][0].device
        self._values = [float(group["lr"]) for group in optimizer.param_groups]
        self._rates = [torch.tensor(v, dtype=torch.float32, device=device) for v in self._values]
        self._settings = self._now()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # makes the state
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step()
        self._state = [
            (parameter, name, value)
            for parameter, _ in self._gradients
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        ]

    def replay(self) -> bool:
        """One step, or False where it has to be made as usual."""
        optimizer: Any = self._optimizer
        if any(vars(optimizer).get(name) for name in _HOOKS) or any(_OF_ALL):
            return False
        if any(p.grad is not gradient for p, gradient in self._gradients):
            return False
        if self._now() != self._settings:
            return False
        self._follow()
        self._graph.replay()
        optimizer._opt_called = True  # noqa: SLF001 - what torch's schedulers ask for
        return True

    def _now(self) -> list[tuple[list[int], dict[str, Any]]]:
        """All that a record holds fast: which parameters, and the groups' values but the rates."""
        return [
            (
                [id(p) for p in group["params"]],
                {k: v for k, v in group.items() if k not in _FREE},
            )
            for group in self._optimizer.param_groups
        ]

    @torch.no_grad()
    def _follow(self) -> None:
        """Rates and state as they are now, in the memory that was recorded."""
        for i, group in enumerate(self._optimizer.param_groups):
            if group["lr"] != self._values[i]:
                self._values[i] = group["lr"]
                self._rates[i].fill_(group["lr"])
        state = self._optimizer.state
        for parameter, name, fixed in self._state:
            value = state[parameter].get(name)
            if value is fixed:
                continue
            if value is None:  # the first step of a training
                fixed.zero_()
            else:
                fixed.copy_(value)
            state[parameter][name] = fixed

    def _step(self) -> None:
        """``step`` with rates from memory; the groups keep their plain numbers."""
        groups = self._optimizer.param_groups
        kept = [dict(group) for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group.update(lr=rate, fused=True, foreach=False)
                if "capturable" in group:
                    group["capturable"] = True
            self._optimizer.step()
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)


def unrecordable(optimizer: Optimizer) -> str:
    """Why an optimizer's step can't be recorded; "" where it can."""
    if type(optimizer) not in KINDS:
        names = ", ".join(kind.__name__ for kind in KINDS)
        return f"the optimizer is {type(optimizer).__name__}; recorded are {names}"
    groups = optimizer.param_groups
    if any(isinstance(v, Tensor) for g in groups for k, v in g.items() if k != "params"):
        return "values of the optimizer's groups are tensors"
    if any(group.get("dampening") for group in groups):
        return "with dampening the first step is another one than those that are recorded"
    if any(group.get("differentiable") for group in groups):
        return "the optimizer's step is differentiable"
    return ""
