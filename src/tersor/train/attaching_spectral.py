"""Attach in order to turn layers into pairs: ``attach(..., algorithm="spectral")``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tersor.capture.samples import flatten_item
from tersor.core.errors import ConfigError
from tersor.core.target import Target
from tersor.train.factorable import Layers, find_layers
from tersor.train.factoring import restore_pair
from tersor.train.factorizer import Factorizer
from tersor.train.pricing import Serving
from tersor.train.probe import Probe
from tersor.train.rank_planning import RankPlanner
from tersor.train.resuming import check_shape
from tersor.train.schedule import Schedule
from tersor.train.spectral_parts import SpectralParts, check_ranks, shapes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the pairs are for.

    Attributes:
        target: As of ``attach``; or
        counts: layer -> rank.
        keep, serving, rescue: As of ``attach``.
    """

    target: Target | None = None
    counts: Mapping[str, int] | None = None
    keep: Sequence[str] = ()
    serving: Serving | None = None
    rescue: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A model before any layer was replaced.

    Attributes:
        parameters: Elements of all of them.
    """

    layers: Layers
    parameters: int


def attach_spectral(
    models: tuple[nn.Module, nn.Module],
    optimizer: Optimizer,
    example: Any,
    schedule: Schedule,
    wish: Wish,
) -> Factorizer:
    """Register the hooks.

    Args:
        models: As the caller has it, and the plain one inside.
        optimizer: That trains it.
        example: As of ``attach``.
        schedule: As of ``attach``.
        wish: What for.

    Raises:
        ConfigError: No layer that a pair can replace, or ranks that none has.
    """
    probe = Probe.of(*flatten_item(example, "example"))
    plain = models[1]
    layers = find_layers(plain, optimizer, probe, wish.keep)
    if not layers.by_name:
        some = "; ".join(f"{h.name}: {h.reason}" for h in layers.held[:5])
        raise ConfigError(
            f"attach: found no layer that can become a pair in {type(plain).__name__}"
            f"{f' ({some})' if some else ''}"
        )
    planner = None
    names = tuple(layers.by_name)
    if wish.counts is not None:
        check_ranks(wish.counts, layers)
        names = tuple(n for n in layers.by_name if n in wish.counts)
    else:
        assert wish.target is not None
        planner = RankPlanner(
            plain, example, layers.by_name, wish.target, wish.serving or Serving()
        )
        names = planner.names
    dense = Dense(layers=layers, parameters=sum(p.numel() for p in plain.parameters()))
    parts = _parts(models, optimizer, (probe, schedule), dense, names, wish)
    return Factorizer(parts if planner is None else _planned(parts, planner))


def restore_spectral(
    model: nn.Module, example: Any, keep: Sequence[str], state: Mapping[str, Any]
) -> Dense:
    """Give a fresh model the pairs of a checkpoint, before its weights are loaded; what it was before.

    Raises:
        ConfigError: The checkpoint is of another structure.
    """
    probe = Probe.of(*flatten_item(example, "example"))
    layers = find_layers(model, None, probe, keep)
    dense = Dense(layers=layers, parameters=sum(p.numel() for p in model.parameters()))
    check_shape(state, shapes_of(layers), "spectral")
    for name, row in state["pairs"]["rows"].items():
        restore_pair(model, name, row)
    return dense


def resumed_spectral(
    models: tuple[nn.Module, nn.Module],
    optimizer: Optimizer,
    example: Any,
    schedule: Schedule,
    dense: Dense,
    state: Mapping[str, Any],
) -> Factorizer:
    """Go on from a checkpoint whose pairs the model has got (``restore_spectral``)."""
    probe = Probe.of(*flatten_item(example, "example"))
    return Factorizer(_parts(models, optimizer, (probe, schedule), dense, (), Wish()), state)


def _parts(
    models: tuple[nn.Module, nn.Module],
    optimizer: Optimizer,
    course: tuple[Probe, Schedule],
    dense: Dense,
    names: tuple[str, ...],
    wish: Wish,
) -> SpectralParts:
    return SpectralParts(
        outer=models[0],
        model=models[1],
        optimizer=optimizer,
        layers=dense.layers,
        names=names,
        shapes=shapes_of(dense.layers),
        parameters=dense.parameters,
        probe=course[0],
        schedule=course[1],
        planner=None,
        counts=wish.counts,
        rescue=wish.rescue,
    )


def _planned(parts: SpectralParts, planner: RankPlanner) -> SpectralParts:
    return replace(parts, planner=planner)
