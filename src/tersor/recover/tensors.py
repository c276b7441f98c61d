"""The tensors that are trained: what they are now, and the free ones of one part."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from tersor.graph.edit import parameters_by_name
from tersor.graph.training import Leaf
from tersor.ops.reconstruction import step_size

Snapshot = dict[str, Tensor]
_MEMORY = 0.98  # of the mean at most: of some fifty steps
_BEGIN = 10.0  # steps after which the mean remembers half of what it will


class Tensors:
    """All stored tensors of a graph; those of the part in training carry gradients."""

    def __init__(self, module: fx.GraphModule, leaves: Sequence[Leaf]) -> None:
        self.leaves = {leaf.target: leaf for leaf in leaves}
        self._stored = parameters_by_name(module)
        self.now: Snapshot = {n: self._stored[n].detach().clone() for n in self.leaves}
        self._free: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}  # of the free ones, over the last steps
        self._steps = 0  # that the mean is of

    def value(self, target: str) -> Tensor:
        """A tensor as it is, or as a function of what is trained."""
        free = self._free.get(target)
        if free is None:
            return self.now.get(target, self._stored[target])
        return self.now[target] * free.exp() if self.leaves[target].is_scale else free

    def begin(self, targets: Sequence[str], rate: float) -> list[dict[str, object]]:
        """Let some tensors be trained.

        Args:
            targets: Their names.
            rate: Size of a step relative to a tensor's own.

        Returns:
            Groups for Adam, one a tensor, each with its step size.
        """
        self._forget()
        groups: list[dict[str, object]] = []
        for target in targets:
            leaf, own = self.leaves[target], self.now[target]
            free = torch.zeros_like(own) if leaf.is_scale else _free_of(own)
            size = rate if leaf.is_scale else self._size(leaf, rate)
            if size > 0:  # zeros beside zeros: nothing says how large a step is
                self._free[target] = free.requires_grad_()
                groups.append({"params": [free], "lr": size})
        return groups

    def average_(self) -> None:
        """Behind a step: the mean moves towards the free tensors, of scales their factors' logarithms.

        Its memory is (1 + n) / (10 + n) after n steps, at most .98, so that it soon forgets where it began.
        """
        if not self._mean:
            self._mean = {name: free.detach().clone() for name, free in self._free.items()}
        memory = min(_MEMORY, (1.0 + self._steps) / (_BEGIN + self._steps))
        self._steps += 1
        free = [self._free[name].detach() for name in self._mean]
        torch._foreach_lerp_(list(self._mean.values()), free, 1.0 - memory)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The mean in the free tensors' place, inside."""
        free = self._free
        self._free = self._mean or free
        try:
            yield
        finally:
            self._free = free

    def _forget(self) -> None:
        self._free, self._mean, self._steps = {}, {}, 0

    def _size(self, leaf: Leaf, rate: float) -> float:
        beside = self.value(leaf.like) if leaf.like in self._stored else self.now[leaf.target]
        is_coded = leaf.like in self.leaves and self.leaves[leaf.like].is_scale
        own = step_size(self.now[leaf.target], rate)
        return own if is_coded else step_size(beside, rate) or own

    def snapshot(self) -> Snapshot:
        """What the free tensors stand for now."""
        return {name: self.value(name).detach().clone() for name in self._free}

    def restore_(self, values: Mapping[str, Tensor]) -> None:
        """Set the free tensors back to some values of theirs; they stay free, and the mean begins anew."""
        self._mean, self._steps = {}, 0
        with torch.no_grad():
            for name, free in self._free.items():
                own = values[name]
                if self.leaves[name].is_scale:  # a step of 0 stays 0, whatever its factor
                    own = (own / self.now[name]).log().nan_to_num(nan=0.0)
                free.copy_(own)

    def end(self, values: Mapping[str, Tensor]) -> None:
        """Take over some values; nothing is free any more."""
        self._forget()
        self.now |= {name: value.contiguous() for name, value in values.items()}


def _free_of(own: Tensor) -> Tensor:
    """A copy; kernels of images lie with their channels innermost, which makes convolutions faster."""
    is_kernel = own.dim() == 4
    return own.clone(memory_format=torch.channels_last if is_kernel else torch.preserve_format)
