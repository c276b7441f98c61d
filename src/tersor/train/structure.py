"""What may shrink in a model that trains: groups of units, by the names of its own tensors.

The groups are the exact widths of the exported graph (``graph.axes``), read without folding, so that each
stored tensor has the name that it has in the model. What the model's own ``forward`` can't do with fewer
units (a size written into the code) is found by trying, and is held, with its reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.module import capture, relative_difference
from tersor.capture.samples import Samples, flatten_item
from tersor.capture.weights import copied
from tersor.core.errors import ConfigError, DataError
from tersor.graph.axes import Axes, Width, analyse_axes
from tersor.train.cutting import cut_, zeroed
from tersor.train.groups import Group, Held, Slot
from tersor.train.literals import literals_after
from tersor.train.probe import Probe

# Sums of fewer terms in another order: a few hundred roundings of 2**-24, of the output's scale.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The groups of a model, what is held, and the widths behind them.

    Attributes:
        graph_axes: None where no width was looked for.
    """

    groups: Mapping[str, Group]
    held: tuple[Held, ...]
    graph_axes: Axes | None

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
        keep: Names of widths, or beginnings of them, to leave whole.

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
    trial = _Trial(copied(model), axes, Probe.of(call, flat))
    groups, refused = _tried(trial, found)
    return Structure(groups=groups, held=(*held, *refused), graph_axes=axes)


def _group(model: nn.Module, axes: Axes, width: Width, keep: Sequence[str]) -> Group | Held:
    if width.exactness != "exact":
        return Held(
            width.name, "a norm's statistics run over it, so that fewer units change the others"
        )
    if any(width.name == k or width.name.startswith(f"{k}.") for k in keep):
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


def _forget_values(module: nn.Module) -> None:
    """The graph's own copies of all weights take memory: sizes are enough from here on."""
    for owner in module.modules():
        for name, value in owner._buffers.items():  # noqa: SLF001
            if value is not None:
                owner._buffers[name] = value.new_zeros(()).expand(value.shape)  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class _Trial:
    """A copy of the model to cut."""

    model: nn.Module
    axes: Axes
    probe: Probe


def _tried(trial: _Trial, groups: dict[str, Group]) -> tuple[dict[str, Group], list[Held]]:
    """The groups that the model's own code runs without some of their units, and computes the same.

    All at once first, as nearly all models can; one by one where that fails.
    """
    refused: list[Held] = []
    if _why_not(trial, list(groups.values())) is None:
        return groups, refused
    fine: dict[str, Group] = {}
    for name, group in groups.items():
        reason = _why_not(trial, [group])
        if reason is None:
            fine[name] = group
        else:
            refused.append(Held(name, reason))
    reason = _why_not(trial, list(fine.values())) if fine else None
    if reason is not None:
        raise ConfigError(
            f"{type(trial.model).__name__}: each of {len(fine)} widths shrinks alone, together they don't: "
            f"{reason}; leave some of them whole with keep=(...): {', '.join(list(fine)[:6])}"
        )
    return fine, refused


def _why_not(trial: _Trial, groups: Sequence[Group]) -> str | None:
    """Why units can't be cut out of a model; None where they can. The model is as before, after."""
    model, probe = trial.model, trial.probe
    kept = {g.name: _half(g) for g in groups}
    with zeroed(model, groups, kept):
        wanted = probe.run(model)
    cut = cut_(model, groups, kept, literals_after(trial.axes, kept))
    try:
        found = probe.run(model)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        line = str(error).strip().splitlines() or [type(error).__name__]
        return f"forward() fails with fewer units: {line[0]}"
    finally:
        cut.undo()
    off = max(
        (
            relative_difference(f, w)
            for f, w in zip(found, wanted, strict=True)
            if w.is_floating_point()
        ),
        default=0.0,
    )
    if off <= TOLERANCE:
        return None
    return f"forward() differs by {off:.1e} of the output's scale once units are cut"


def _half(group: Group) -> Tensor:
    """Every other unit, as many as must stay at the least."""
    count = max(group.least, -(-group.units // 2))
    return (torch.arange(count) * group.units) // count
