"""The tensors that are trained: what they are now, and the free ones of one part."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from tersor.graph.edit import parameters_by_name
from tersor.graph.training import Leaf
from tersor.ops.reconstruction import step_size

Snapshot = dict[str, Tensor]


class Tensors:
    """All stored tensors of a graph; those of the part in training carry gradients."""

    def __init__(self, module: fx.GraphModule, leaves: Sequence[Leaf]) -> None:
        self.leaves = {leaf.target: leaf for leaf in leaves}
        self._stored = parameters_by_name(module)
        self.now: Snapshot = {n: self._stored[n].detach().clone() for n in self.leaves}
        self._free: dict[str, Tensor] = {}

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
        self._free = {}
        groups: list[dict[str, object]] = []
        for target in targets:
            leaf, own = self.leaves[target], self.now[target]
            free = torch.zeros_like(own) if leaf.is_scale else own.clone()
            size = rate if leaf.is_scale else self._size(leaf, rate)
            if size > 0:  # zeros beside zeros: nothing says how large a step is
                self._free[target] = free.requires_grad_()
                groups.append({"params": [free], "lr": size})
        return groups

    def _size(self, leaf: Leaf, rate: float) -> float:
        beside = self.value(leaf.like) if leaf.like in self._stored else self.now[leaf.target]
        is_coded = leaf.like in self.leaves and self.leaves[leaf.like].is_scale
        own = step_size(self.now[leaf.target], rate)
        return own if is_coded else step_size(beside, rate) or own

    def snapshot(self) -> Snapshot:
        """What the free tensors stand for now."""
        return {name: self.value(name).detach().clone() for name in self._free}

    def restore_(self, values: Mapping[str, Tensor]) -> None:
        """Set the free tensors back to some values of theirs; they stay free."""
        with torch.no_grad():
            for name, free in self._free.items():
                own = values[name]
                if self.leaves[name].is_scale:  # a step of 0 stays 0, whatever its factor
                    own = (own / self.now[name]).log().nan_to_num(nan=0.0)
                free.copy_(own)

    def end(self, values: Mapping[str, Tensor]) -> None:
        """Take over some values; nothing is free any more."""
        self._free = {}
        self.now |= dict(values)
