"""One batch that a model is asked before and after a change of its structure."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.configuration import WITHOUT_CACHE, configured
from tersor.capture.module import evaluation_mode
from tersor.capture.samples import Call
from tersor.capture.structures import describe
from tersor.capture.weights import state_restored
from tersor.core.records import Structure
from tersor.core.structure import unflatten
from tersor.graph.tf32 import tf32


@dataclass(frozen=True, slots=True)
class Probe:
    """A call of a model with one batch, on whatever device and in whatever float type it is."""

    call: Call
    flat: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: Call, flat: Sequence[Tensor]) -> "Probe":
        """A probe from flat inputs on the CPU."""
        return cls(call, tuple(t.detach().clone() for t in flat))

    def run(self, model: nn.Module, *, training: bool = False) -> list[Tensor]:
        """The tensors of the model's outputs; modes, buffers and random states stay as they are.

        Without shortened mantissas, whatever the caller trains with: answers are compared to roundings.

        Args:
            model: Not changed.
            training: In training mode, in which a model may use more of its layers; else in evaluation mode.
        """
        first = next(iter(model.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        dtype = torch.float32 if first is None else first.dtype
        both = Structure(kind="tuple", children=(self.call.args, self.call.kwargs))
        moved = [t.to(device) for t in self.flat]
        moved = [t.to(dtype) if t.is_floating_point() else t for t in moved]
        args, kwargs = unflatten(both, moved)
        mode = _training_mode(model) if training else evaluation_mode(model)
        quiet = (state_restored(model), configured(model, WITHOUT_CACHE), mode)
        exact = (tf32(enabled=False), torch.autocast(device.type, enabled=False))
        with quiet[0], quiet[1], quiet[2], exact[0], exact[1], torch.no_grad():
            found: Any = model(*args, **kwargs)
        leaves: list[Tensor] = []
        describe(found, leaves)
        return leaves


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode inside; every submodule's own mode and the random state after."""
    modes = {module: module.training for module in model.modules()}
    cards = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.train()
    try:
        with torch.random.fork_rng(devices=cards):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
