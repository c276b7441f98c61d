"""Whether a model's own code runs with fewer units, and computes the same: found by trying on a copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.capture.module import relative_difference
from tersor.capture.weights import copied
from tersor.core.errors import ConfigError
from tersor.graph.axes import Axes
from tersor.train.cutting import Kept, cut_, zeroed
from tersor.train.groups import Group, Held
from tersor.train.literals import literals_after
from tersor.train.probe import Probe

# Sums of fewer terms in another order: a few hundred roundings of 2**-24, of the output's scale.
TOLERANCE = 1e-5
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


@dataclass(frozen=True, slots=True)
class Trial:
    """A copy of the model to cut.

    Attributes:
        trains: Whether it is asked in training mode as well, in which it uses more of its layers.
        unread: Trained parameters that it reads in no mode.
    """

    model: nn.Module
    axes: Axes
    probe: Probe
    trains: bool = False
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, axes: Axes, probe: Probe) -> "Trial":
        """A trial; a model that can't train on the example alone is asked in evaluation mode only."""
        nodes = axes.graph.module.graph.nodes
        read = {str(node.target) for node in nodes if node.op == "get_attr"}
        named = dict(model.named_parameters(remove_duplicate=False))
        known = {id(p) for n, p in named.items() if n in read}
        unread = {n: p for n, p in named.items() if p.requires_grad and id(p) not in known}
        if not unread:
            return cls(model, axes, probe)
        called: set[nn.Module] = set()
        handles = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in model.modules()]
        trains = _failure(model, probe, training=True) is None
        for handle in handles:
            handle.remove()
        never = (n for n in unread if model.get_submodule(n.rpartition(".")[0]) not in called)
        return cls(model, axes, probe, trains, tuple(never) if trains else tuple(unread))


def worst_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any output, of its scale; 0 without floats."""
    pairs = zip(found, wanted, strict=True)
    differences = (relative_difference(f, w) for f, w in pairs if w.is_floating_point())
    return max(differences, default=0.0)


def difference_in_double(
    model: nn.Module,
    probe: Probe,
    groups: Sequence[Group],
    kept: Kept,
    literals: Mapping[str, Mapping[str, int]],
) -> float | None:
    """How far a cut model's answer is from the zeroed one's where neither is rounded to float32.

    Large sums that cancel (inputs that nobody has scaled) are off by more than their result allows in
    float32 whichever way they are added up.

    Args:
        model: Has all of its units; not changed.
        probe: What it is asked.
        groups: Those that are cut.
        kept: Of each of them the units that stay.
        literals: As for ``cut_``.

    Returns:
        None where the model's code can't run in float64.
    """
    wide = copied(model).double()
    try:
        with zeroed(wide, groups, kept):
            wanted = probe.run(wide)
        cut_(wide, groups, kept, literals)
        return worst_difference(probe.run(wide), wanted)
    except _FAILURES:
        return None


def tried(trial: Trial, groups: dict[str, Group]) -> tuple[dict[str, Group], list[Held]]:
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


def _why_not(trial: Trial, groups: Sequence[Group]) -> str | None:
    """Why units can't be cut out of a model; None where they can. The model is as before, after."""
    model, probe = trial.model, trial.probe
    kept = {g.name: _half(g) for g in groups}
    literals = literals_after(trial.axes, kept)
    with zeroed(model, groups, kept):
        wanted = probe.run(model)
    cut = cut_(model, groups, kept, literals)
    try:
        found = probe.run(model)
        failure = _failure(model, probe, training=True) if trial.trains else None
    except _FAILURES as error:
        return f"forward() fails with fewer units: {_line(error)}"
    finally:
        cut.undo()
    if failure is not None:
        return f"forward() fails in training mode with fewer units: {failure}"
    off = worst_difference(found, wanted)
    if not off <= TOLERANCE:
        exact = difference_in_double(model, probe, groups, kept, literals)
        off = off if exact is None else exact
    if off <= TOLERANCE:
        return None
    return f"forward() differs by {off:.1e} of the output's scale once units are cut"


def _failure(model: nn.Module, probe: Probe, *, training: bool) -> str | None:
    """The first line of what a model says that does not run; None where it does."""
    try:
        probe.run(model, training=training)
    except _FAILURES as error:
        return _line(error)
    return None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _half(group: Group) -> Tensor:
    """Every other unit, as many as must stay at the least."""
    count = max(group.least, -(-group.units // 2))
    return (torch.arange(count) * group.units) // count
