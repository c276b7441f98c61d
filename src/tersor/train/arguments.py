"""What ``attach`` was given, looked at before anything is done with it."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from tersor.core.errors import ConfigError
from tersor.core.target import Target
from tersor.train.schedule import Schedule
from tersor.train.structure import Structure


def check_kinds(
    model: Any,
    *,
    target: Any,
    counts: Any,
    schedule: Any,
    rescue: Any,
    keep: Any,
) -> None:
    """Refuse arguments of another type than ``attach`` takes.

    Raises:
        ConfigError: Says which, what was found and what was wanted.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: found {type(model).__name__}, wanted a torch.nn.Module")
    parameters: list[tuple[str, Any]] = list(model.named_parameters())
    lazy = next((n for n, p in parameters if is_lazy(p)), None)
    if lazy is not None:
        raise ConfigError(
            f"{lazy}: has no size yet (a lazy layer); run the model once and attach then"
        )
    wanted: tuple[tuple[str, Any, Any, str], ...] = (
        ("target", target, Target, "tersor.Target(...)"),
        ("counts", counts, Mapping, "{group: units}"),
        ("schedule", schedule, Schedule, "tersor.train.Schedule(total_steps=...)"),
        ("rescue", rescue, (str, Path), "a folder"),
    )
    for name, value, kinds, text in wanted:
        if value is not None and not isinstance(value, kinds):
            raise ConfigError(f"{name}: found {value!r}, wanted {text} or None")
    if isinstance(keep, str) or not isinstance(keep, Sequence):
        raise ConfigError(f"keep: found {keep!r}, wanted a tuple of names of layers or widths")
    names: list[object] = list(keep)
    odd = next((k for k in names if not isinstance(k, str)), None)
    if odd is not None:
        raise ConfigError(f"keep: found {odd!r} in it, wanted names of layers or widths")


def check_keep(keep: Sequence[str], model: nn.Module, structure: Structure) -> None:
    """Refuse names of nothing: a layer that was to stay would shrink.

    Raises:
        ConfigError: Names the first, and some that there are.
    """
    layers = [n for n, _ in model.named_modules() if n]
    widths = [*structure.groups, *(h.name for h in structure.held)]
    for name in keep:
        if not any(n == name or n.startswith(f"{name}.") for n in (*layers, *widths)):
            raise ConfigError(
                f"keep: {name!r} is neither a layer nor a width of {type(model).__name__}; there are "
                f"{', '.join((widths or layers)[:8])}"
            )


def checked_counts(counts: Mapping[str, Any], structure: Structure) -> dict[str, int]:
    """Counts as plain numbers.

    Raises:
        ConfigError: A name of no width that may shrink, or a number out of its range.
    """
    found: dict[str, int] = {}
    for name, count in counts.items():
        group = structure.groups.get(name)
        if group is None:
            why = next((h.reason for h in structure.held if h.name == name), "")
            raise ConfigError(
                f"counts: {name!r} is no width that may shrink{f': {why}' if why else ''}; there are "
                f"{', '.join(list(structure.groups)[:8])}"
            )
        try:
            number = -1 if isinstance(count, bool) else operator.index(count)
        except TypeError:
            number = -1
        if not group.least <= number <= group.units:
            raise ConfigError(
                f"counts: {name}: found {count!r}, wanted {group.least} to {group.units} units"
            )
        found[name] = number
    return found
