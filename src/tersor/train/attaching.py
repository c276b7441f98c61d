"""Attach to a user's own optimizer, so that the model comes out of training small."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tersor.capture.samples import flatten_item
from tersor.core.errors import ConfigError
from tersor.core.target import Target
from tersor.train.algorithms import NAMES
from tersor.train.arguments import check_keep, check_kinds, checked_counts
from tersor.train.attaching_spectral import Dense, Wish, attach_spectral, resumed_spectral
from tersor.train.factorizer import Factorizer
from tersor.train.parts import Parts
from tersor.train.planning import Planner
from tersor.train.pricing import Serving
from tersor.train.probe import Probe
from tersor.train.ranks import is_replicated
from tersor.train.rounding import Rounding, Wanted, rounding_of
from tersor.train.schedule import Schedule
from tersor.train.sharding import Shard, check_sharded, gathered
from tersor.train.shrinker import Shrinker
from tersor.train.structure import NO_WIDTHS, Structure, find_structure

SPECTRAL = "spectral"
_MARK = "_tersor_shrinker"  # on an optimizer that has one


def attach(  # noqa: PLR0913 - the public contract
    model: nn.Module,
    optimizer: Optimizer,
    example: Any,
    *,
    total_steps: int,
    target: Target | None = None,
    counts: Mapping[str, int] | None = None,
    bits: int | Mapping[str, int] | None = None,
    algorithm: str = "regrow",
    schedule: Schedule | None = None,
    keep: Sequence[str] = (),
    device: str = "cpu",
    backend: str = "auto",
    batch: int = 1,
    cache_dir: str | Path | None = None,
    rescue: str | Path | None = None,
    progress: Any = True,
    shard: Shard | None = None,
) -> Shrinker | Factorizer:
    """Register hooks on an optimizer that make the model small while it trains.

    The caller keeps optimizer, scheduler and loop::

        shrinker = tersor.train.attach(
            model, optimizer, example, target=tersor.Target(speedup=2), total_steps=steps
        )
        ...  # the usual loop
        small, report = shrinker.finish()

    Args:
        model: Trains in place; compiled, replicated by DistributedDataParallel, or sharded, as it may be.
        optimizer: Any of ``torch.optim`` or like them, with the model's parameters.
        example: One batch of the model's inputs, without labels: a tensor, a tuple or a dict.
        total_steps: Steps of the optimizer in the whole run.
        target: What the model has to reach where it will serve: ``speedup`` over the best uncompressed
            build, ``latency_ms``, ``size_mb``, ``size_ratio``. Prices are measured now.
        counts: In place of a target: group -> units to keep. ``tersor.inspect`` lists the widths.
        bits: 4, 3 or 2, of the weights of linear layers and convolutions, or layer -> bits: they are
            pulled to a grid and end on it, so that files hold them in so many bits without loss. Alone,
            or after the model has shrunk.
        algorithm: "regrow" (dead units may come back), "ramp" (they fade, once), "prox" (they are pulled
            to zero by the budget); or "spectral": no unit dies, layers become pairs of thinner ones once
            the spectra of their weights settle. ``counts`` is then layer -> rank.
        schedule: When units die; None: from 5 % to 40 % of the run, a look every 20 steps.
        keep: Names of layers whose widths, and bits, stay as they are.
        device: Where the model will serve; it may train elsewhere.
        backend: As for ``tersor.compress``.
        batch: Samples of one call there.
        cache_dir: Of prices; None: the usual one.
        rescue: A folder for the last sound state of model, optimizer and shrinker, once a minute at
            most, until the model shrinks; ``tersor.train.rescued`` reads it.
        progress: As for ``tersor.compress``.
        shard: Of a model that ``torch.distributed.fsdp.fully_shard`` has sharded: takes a plain model and
            shards it the same way. It is called with the smaller model, in ``epoch_end``.

    Returns:
        The shrinker: ``finish``, ``state_dict``, ``load_state_dict``, ``epoch_end``, ``kept``.

    Raises:
        ConfigError: Both of target and counts, or none of these and bits, a wrapper or an optimizer that can't be served,
            no width that may shrink (with the reasons), a schedule that does not fit.
        TargetError: A target that training can't promise.
        CaptureError: The model can't be exported.
    """
    plain = _unwrapped(model)
    check_kinds(plain, target=target, counts=counts, schedule=schedule, rescue=rescue, keep=keep)
    check_sharded(plain, shard)
    _check_optimizer(optimizer, plain)
    has_widths = target is not None or counts is not None
    if (target is not None and counts is not None) or not (has_widths or bits is not None):
        raise ConfigError(
            "attach: give either target=tersor.Target(...) or counts={group: units}, not "
            f"{'both' if has_widths else 'neither'}; or bits= alone"
        )
    planned = _schedule(schedule, total_steps)
    _check_algorithm(algorithm, bits)
    _check_shard(shard, algorithm, bits, rescue)
    folder = None if rescue is None else Path(rescue)
    serving = Serving(
        device=device, backend=backend, batch=batch, cache_dir=cache_dir, progress=progress
    )
    if algorithm == SPECTRAL:
        check_keep(keep, plain, NO_WIDTHS)
        wish = Wish(target=target, counts=counts, keep=keep, serving=serving, rescue=folder)
        factorizer = attach_spectral((model, plain), optimizer, example, planned, wish)
        setattr(optimizer, _MARK, factorizer)
        return factorizer
    structure = NO_WIDTHS
    copy = plain if shard is None else gathered(plain)
    if has_widths:
        structure = find_structure(copy, example, keep=keep)
    check_keep(keep, plain, structure)
    if has_widths:
        _check_groups(structure, optimizer, plain)
    rounding = _rounding(plain, optimizer, {"bits": bits, "keep": keep}, planned, structure)
    if counts is not None:
        counts = checked_counts(counts, structure)
    planner = None
    if target is not None:
        planner = Planner(copy, example, structure, target, serving)
    shrinker = Shrinker(
        Parts(
            outer=model,
            model=plain,
            optimizer=optimizer,
            structure=structure,
            probe=Probe.of(*flatten_item(example, "example")),
            schedule=planned,
            planner=planner,
            counts=counts,
            algorithm=algorithm,
            rescue=folder,
            rounding=rounding,
            shard=shard,
        )
    )
    setattr(optimizer, _MARK, shrinker)
    return shrinker


def resumed(
    model: nn.Module,
    optimizer: Optimizer,
    example: Any,
    structure: Structure | Dense,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Shrinker | Factorizer:
    """Go on from a checkpoint that was cut; the model has got its structure before its weights.

    Args:
        model: With the structure of the state.
        optimizer: That trains it.
        example: One batch of the model's inputs.
        structure: Of the model when the run began; of one whose layers become pairs, what it was.
        state: Of ``state_dict``.
        options: As of ``attach``: its schedule, bits, keep and counts are taken; the last are only
            compared.
    """
    plain = _unwrapped(model)
    check_sharded(plain, None)
    _check_optimizer(optimizer, plain)
    planned = _schedule(options.get("schedule"), int(state["total_steps"]))
    known = state.get("rounding") or {"bits": ()}
    if isinstance(structure, Dense):
        factorizer = resumed_spectral((model, plain), optimizer, example, planned, structure, state)
        setattr(optimizer, _MARK, factorizer)
        return factorizer
    shrinker = Shrinker(
        Parts(
            outer=model,
            model=plain,
            optimizer=optimizer,
            structure=structure,
            probe=Probe.of(*flatten_item(example, "example")),
            schedule=planned,
            planner=None,
            counts=options.get("counts"),
            algorithm=str(state["algorithm"]),
            rounding=_rounding(plain, optimizer, options, planned, structure, tuple(known["bits"])),
        ),
        state,
    )
    setattr(optimizer, _MARK, shrinker)
    return shrinker


def _check_shard(shard: Shard | None, algorithm: str, bits: Any, rescue: str | Path | None) -> None:
    """Refuse what a sharded model can't have.

    Raises:
        ConfigError: Says what, and the way out.
    """
    if shard is None:
        return
    if rescue is not None:
        raise ConfigError("rescue: not for a sharded model; write checkpoints of your own")
    if algorithm == SPECTRAL or bits is not None:
        raise ConfigError(
            f"shard: found {'bits=' if bits is not None else 'algorithm='}"
            f"{bits if bits is not None else algorithm!r}, wanted units alone under fully_shard; train "
            "under DistributedDataParallel for pairs and few bits"
        )


def _check_algorithm(algorithm: str, bits: int | Mapping[str, int] | None) -> None:
    if algorithm not in (*NAMES, SPECTRAL):
        raise ConfigError(
            f"algorithm: found {algorithm!r}, wanted one of {', '.join((*NAMES, SPECTRAL))}"
        )
    if algorithm == SPECTRAL and bits is not None:
        raise ConfigError(
            "attach: found algorithm='spectral' and bits; wanted one of them: weights that were pairs' products "
            "have no grid. Give the result to tersor.compress, or attach again with bits once it is finished"
        )


def _rounding(
    model: nn.Module,
    optimizer: Optimizer,
    options: Mapping[str, Any],
    schedule: Schedule,
    structure: Structure,
    known: Sequence[str] = (),
) -> Rounding:
    """The weights that are to have few bits, once no unit dies any more."""
    bits = options.get("bits")
    if bits is None:
        return Rounding()
    begin = schedule.last if structure.groups else schedule.first
    wanted = Wanted(bits=bits, keep=options.get("keep", ()), known=known)
    found = rounding_of(model, optimizer, wanted, schedule, begin=begin)
    found.is_shared = is_replicated(model)
    return found


def _schedule(schedule: Schedule | None, total_steps: int) -> Schedule:
    planned = schedule or Schedule(total_steps=total_steps)
    if planned.total_steps != total_steps:
        raise ConfigError(
            f"attach: found total_steps={total_steps} and a schedule of {planned.total_steps}; wanted one"
        )
    return planned


def _unwrapped(model: nn.Module) -> nn.Module:
    """The plain module inside of a compiled or replicated one.

    Raises:
        ConfigError: A wrapper whose parameters are flat or lie with others.
    """
    name = f"{type(model).__module__}.{type(model).__name__}"
    if name.startswith("deepspeed.") or name.endswith(".FullyShardedDataParallel"):
        raise ConfigError(
            f"attach: found {name}, whose parameters are flat pieces without rows and columns; attach to the "
            "plain model under DistributedDataParallel, or train on one device"
        )
    if isinstance(model, DistributedDataParallel):
        return _unwrapped(model.module)
    inside = getattr(model, "_orig_mod", None)  # of torch.compile
    return _unwrapped(inside) if isinstance(inside, nn.Module) else model


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"attach: found {type(optimizer).__name__}, wanted a torch.optim.Optimizer; with Accelerate or "
            "DeepSpeed attach to the plain optimizer before prepare()"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "attach: found LBFGS, whose history is one flat vector of all parameters that no cut can follow; train "
            "with SGD, AdamW or another optimizer that keeps its states by parameter"
        )
    known = getattr(optimizer, _MARK, None)
    if known is not None and known._handles:  # noqa: SLF001
        raise ConfigError("attach: this optimizer has a shrinker already; call its finish() first")
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own & {id(p) for p in model.parameters()}:
        raise ConfigError(
            "attach: the optimizer has none of the model's parameters; pass the optimizer that trains it"
        )


def _check_groups(structure: Structure, optimizer: Optimizer, model: nn.Module) -> None:
    """At least one width, and all that makes its units is trained by this optimizer."""
    if not structure.groups:
        reasons = "; ".join(f"{h.name}: {h.reason}" for h in structure.held[:5])
        raise ConfigError(
            f"attach: found no width that may shrink in {type(model).__name__}"
            f"{f' ({reasons})' if reasons else ''}; tersor.inspect(model, example) lists what holds each"
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = {
        group.name: slot.tensor
        for group in structure.groups.values()
        for slot in group.slots
        if slot.is_made and id(model.get_parameter(slot.tensor)) not in own
    }
    if foreign:
        name, tensor = next(iter(foreign.items()))
        more = f" (and so for {len(foreign) - 1} more widths)" if len(foreign) > 1 else ""
        raise ConfigError(
            f"attach: {tensor} makes units of {name} and is in no group of the optimizer{more}; add it (one "
            "optimizer has to train all that shrinks), set requires_grad=False, or leave what it makes whole with "
            f"keep={tuple(foreign)!r}"
        )
