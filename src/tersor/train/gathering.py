"""What layers read in the last steps before they are replaced: the moments of their inputs, by hooks.

Sums stay on the device. A compiled model does not call hooks that come later: there the plain module runs once
more on each batch, in evaluation mode and without gradients, as long as moments are gathered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.module import evaluation_mode
from tersor.capture.weights import state_restored
from tersor.ops.moments import Moments, add_moments, moments_of, unfold
from tersor.train.factorable import Layer
from tersor.train.probe import Probe

MOST_ROWS = 2048  # of a layer in one call: more say nothing new, and take time


@dataclass
class Gathering:
    """Moments of the inputs of some layers.

    Attributes:
        model: The plain module.
        layers: By name.
        moments: What was gathered so far.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    moments: dict[str, Moments] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list, repr=False)
    _is_eager: bool = field(default=False, repr=False)

    @property
    def is_on(self) -> bool:
        """Whether hooks are there."""
        return bool(self._handles)

    def begin(self, outer: nn.Module) -> None:
        """Register the hooks; ``outer``: the model as the caller runs it."""
        if self.is_on:
            return
        if isinstance(outer, torch._dynamo.OptimizedModule):  # noqa: SLF001
            self._handles.append(outer.register_forward_pre_hook(self._again, with_kwargs=True))
        else:
            self._handles += self._hooks()

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def ask(self, probe: Probe) -> tuple[str, ...]:
        """Gather from one batch what no training step has shown; names of the layers that needed it."""
        missing = tuple(n for n in self.layers if n not in self.moments)
        if missing:
            self._run(partial(probe.run, self.model), missing)
        return missing

    def _again(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            with state_restored(self.model), evaluation_mode(self.model), torch.no_grad():
                self._run(partial(self.model, *args, **kwargs), tuple(self.layers))

    def _run(self, call: Any, names: Sequence[str]) -> None:
        handles = self._hooks(names)
        self._is_eager = True
        try:
            call()
        finally:
            self._is_eager = False
            for handle in handles:
                handle.remove()

    def _hooks(self, names: Sequence[str] | None = None) -> list[Any]:
        return [
            self.model.get_submodule(n).register_forward_pre_hook(partial(self._take, n))
            for n in (self.layers if names is None else names)
        ]

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """What one call of a layer reads; evaluation passes do not count."""
        if not (self._is_eager or torch.is_grad_enabled()) or not args:
            return
        with torch.no_grad():
            found = moments_of(rows_of(args[0].detach(), module))
        known = self.moments.get(name)
        self.moments[name] = found if known is None else add_moments(known, found)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        return {
            n: {"count": m.count, "xx": m.xx.cpu(), "x": m.x.cpu()} for n, m in self.moments.items()
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a saved state."""
        self.moments = {
            n: Moments(count=int(s["count"]), xx=s["xx"].to(device), x=s["x"].to(device))
            for n, s in state.items()
        }


def rows_of(x: Tensor, module: nn.Module) -> Tensor:
    """Some rows of a layer's unfolded input [t, 1, n], evenly spread, float32."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return _spread(rows, MOST_ROWS).float().unsqueeze(1)
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    places = prod(
        -(-size // step) for size, step in zip(images.shape[2:], module.stride, strict=True)
    )
    some = _spread(images, max(1, MOST_ROWS // max(1, places))).float()
    rows = unfold(
        some,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.padding),
        tuple(module.dilation),
        1,
    )
    return _spread(rows, MOST_ROWS)


def _spread(rows: Tensor, most: int) -> Tensor:
    count = len(rows)
    if count <= most:
        return rows
    index = torch.arange(most, device=rows.device) * count // most
    return rows[index]
