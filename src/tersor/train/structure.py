"""What may shrink in a model that trains: groups of units, by the names of its own tensors.

The groups are the exact widths of the exported graph (``graph.axes``), read without folding, so that each
stored tensor has the name that it has in the model. What the model's own ``forward`` can't do with fewer
units (a size written into the code) is found by trying, and is held, with its reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.capture.weights import copied
from tersor.core.errors import DataError
from tersor.graph.axes import Axes, Width, analyse_axes
from tersor.train.groups import Group, Held, Slot
from tersor.train.probe import Probe
from tersor.train.trial import Trial, tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The groups of a model, what is held, and the widths behind them.

    Attributes:
        graph_axes: None where no width was looked for.
        unread: Trained parameters that ``forward`` reads in no mode.
    """

    groups: Mapping[str, Group]
    held: tuple[Held, ...]
    graph_axes: Axes | None
    unread: tuple[str, ...] = ()

    @property
    def axes(self) -> Axes:
        """The widths behind the groups, of which there are some."""
        assert self.graph_axes is not None
        return self.graph_axes


NO_WIDTHS = Structure(groups={}, held=(), graph_axes=None)  # of a run that leaves all widths whole


def find_structure(model: nn.Module, example: Any, *, keep: Sequence[str] = ()) -> Structure:
    """The groups of units of a model; it is not changed.

    Args:
        model: As it trains; exported in evaluation mode.
        example: One batch of its inputs, as an item of ``tersor.compress``'s data.
        keep: Names of widths or of layers whose outputs they count, or beginnings of them, to leave whole.

    Raises:
        CaptureError: The model can't be exported; says the way out.
        DataError: The model does not take the example.
    """
    call, flat = flatten_item(example, "example")
    if len({int(t.shape[0]) for t in flat}) != 1:
        raise DataError(
            f"example: the tensors hold {[int(t.shape[0]) for t in flat]} samples in dimension 0, "
            "wanted one number; pass what the model takes, without labels"
        )
    axes = analyse_axes(capture(model, Samples(call, flat), fold=False).graph)
    found: dict[str, Group] = {}
    held: list[Held] = []
    for width in axes.widths:
        made = _group(model, axes, width, keep)
        if isinstance(made, Held):
            held.append(made)
        else:
            found[made.name] = made
    _forget_values(axes.graph.module)
    trial = Trial.of(copied(model), axes, Probe.of(call, flat))
    groups, refused = tried(trial, found)
    return Structure(groups=groups, held=(*held, *refused), graph_axes=axes, unread=trial.unread)


def _group(model: nn.Module, axes: Axes, width: Width, keep: Sequence[str]) -> Group | Held:
    if width.exactness != "exact":
        return Held(
            width.name, "a norm's statistics run over it, so that fewer units change the others"
        )
    if any(_is_of(width, k) for k in keep):
        return Held(width.name, "named in keep")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = parameters | dict(model.named_buffers(remove_duplicate=False))
    slots = []
    for coupling in width.couplings:
        if coupling.tensor not in known:
            return Held(
                width.name, f"runs through {coupling.tensor}, which is computed, not stored"
            )
        own = parameters.get(coupling.tensor)
        if own is not None and not own.requires_grad:
            return Held(width.name, f"runs through {coupling.tensor}, which is frozen")
        dim = axes.walk.stored[coupling.tensor][coupling.dim]
        slots.append(
            Slot(
                tensor=coupling.tensor,
                dim=coupling.dim,
                units=torch.from_numpy(axes.units_of(width, dim)),
                is_made=own is not None and coupling.role != "consumer",
            )
        )
    if not any(slot.is_made for slot in slots):
        return Held(width.name, "no parameter makes its units")
    return Group(
        name=width.name, kind=width.kind, units=width.units, slots=tuple(slots), least=width.least
    )


def _is_of(width: Width, name: str) -> bool:
    """Whether a name, or the beginning of one, is a width's own or that of a layer whose outputs it counts."""
    made = [c.tensor for c in width.couplings if c.role != "consumer"]
    own = width.name.partition(":")[0]
    return name in (width.name, own) or any(n.startswith(f"{name}.") for n in (own, *made))


def _forget_values(module: nn.Module) -> None:
    """The graph's own copies of all weights take memory: sizes are enough from here on."""
    for owner in module.modules():
        for name, value in owner._buffers.items():  # noqa: SLF001
            if value is not None:
                owner._buffers[name] = value.new_zeros(()).expand(value.shape)  # noqa: SLF001
