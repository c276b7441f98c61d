"""One batch that a model is asked before and after a change of its structure."""

from collections.abc import Sequence
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

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of the model's outputs in evaluation mode; modes and buffers stay as they are.

        Without shortened mantissas, whatever the caller trains with: answers are compared to roundings.
        """
        first = next(iter(model.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        dtype = torch.float32 if first is None else first.dtype
        both = Structure(kind="tuple", children=(self.call.args, self.call.kwargs))
        moved = [t.to(device) for t in self.flat]
        moved = [t.to(dtype) if t.is_floating_point() else t for t in moved]
        args, kwargs = unflatten(both, moved)
        quiet = (state_restored(model), configured(model, WITHOUT_CACHE), evaluation_mode(model))
        exact = (tf32(enabled=False), torch.autocast(device.type, enabled=False))
        with quiet[0], quiet[1], quiet[2], exact[0], exact[1], torch.no_grad():
            found: Any = model(*args, **kwargs)
        leaves: list[Tensor] = []
        describe(found, leaves)
        return leaves
