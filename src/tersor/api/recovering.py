"""Recovery within one result: which graph is trained on what, for how long, and whether it stays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.api.proposing import as_arrays, as_tensors
from tersor.api.quality import Quality
from tersor.api.session import Session
from tersor.api.shrink import Changes, counterparts_of
from tersor.core.errors import StoreError
from tersor.core.jsonable import digest, from_json
from tersor.core.recovery import PartRecovery, Recover, Recovery
from tersor.graph.changes import ChangeRecords, pack, unpack
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.meta import read_back, refresh
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.observe.ranks import Parcel
from tersor.recover.blocks import (
    Hooks,
    More,
    Progressed,
    Reconstructed,
    part_count,
    reconstruct,
)
from tersor.recover.goals import HELD_OUT, Judged, Teacher

RECOVER = "recover"  # what other ranks do along with rank 0
_ROUNDED_SHARE = 0.25  # of the seconds, where weights were trained before they were rounded
_LEAST_BATCHES = 2 * HELD_OUT  # few samples: smaller batches, so that some can be held out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partial:
    """What an interrupted run has done; its tensors are the arrays."""

    parts: tuple[PartRecovery, ...]
    seconds: float


def recovery_key(session: Session, key: str) -> str:
    """A key of what follows recovery: the given one without it."""
    config = session.settings.recover
    if config is None:
        return key
    taught = session.taught
    return digest(key, config.budget(), None if taught is None else taught.key)


def seconds_for(session: Session, changed: Changes, *, is_rounded: bool) -> Recover | None:
    """The budget of recovery before (weights) or after (what is left) formats are rounded."""
    config = session.settings.recover
    config = None if config is None else config.budget()
    has_both = not changed.keeps_all and bool(changed.formats)
    if config is None or not has_both:
        return config
    share = _ROUNDED_SHARE if is_rounded else 1.0 - _ROUNDED_SHARE
    return replace(config, seconds=share * config.seconds)


def recovered(
    session: Session, changed: Changes, graph: Graph, quality: Quality, place: tuple[str, bool]
) -> tuple[Graph, Recovery | None]:
    """A compressed graph after recovery, and what was done; as it is where none was asked for.

    ``place``: the key of the plan, and whether formats are rounded already. Found again in the store
    where it was done before; where it was interrupted, it goes on behind the last part that was done.
    """
    key, is_rounded = place
    config = seconds_for(session, changed, is_rounded=is_rounded)
    if config is None:
        return graph, None
    taught = session.taught
    key = digest(key, is_rounded, config, None if taught is None else taught.key)
    kept = session.store.get(Recovery, "recover", key)
    if kept is not None:
        arrays = session.store.arrays("recover", key)
        return _with_tensors(graph, _tensors(arrays)), kept
    found, recovery = _run(session, changed, graph, config, key)
    has_labels = taught is not None and taught.loss is not None
    found, recovery = _checked(graph, found, recovery, quality, has_labels=has_labels)
    session.progress.note(recovery.describe())
    own = _changed_tensors(graph, found)
    arrays = {name: t.contiguous().numpy() for name, t in own.items()}
    session.store.put("recover", key, recovery, arrays)
    session.store.remove("recovering", key)
    return found, recovery


def _run(
    session: Session, changed: Changes, graph: Graph, config: Recover, key: str
) -> tuple[Graph, Recovery]:
    teacher = Teacher(
        graph=session.graph, kind=session.kind, counterparts=counterparts_of(session, changed)
    )
    part = session.parts["calibration"]
    batch = max(1, min(config.batch, len(part) // _LEAST_BATCHES))
    config = replace(config, batch=batch)
    session.progress.stage("recover", part_count(graph, teacher))

    def keep(done: Progressed) -> None:
        arrays = {name: t.contiguous().numpy() for name, t in done.tensors.items()}
        record = _Partial(parts=done.parts, seconds=done.seconds)
        session.store.put("recovering", key, record, arrays)

    done = _interrupted(session, key)
    hooks = Hooks(advance=session.progress.advance, keep=keep)
    with session.ranks.together(RECOVER, _call(changed, graph, config, done)):
        found = _reconstructed(session, teacher, graph, config, (done, hooks))
    return found.graph, found.recovery


def _reconstructed(
    session: Session,
    teacher: Teacher,
    graph: Graph,
    config: Recover,
    how: tuple[Progressed | None, Hooks],
) -> Reconstructed:
    done, hooks = how
    return reconstruct(
        teacher,
        graph,
        list(session.parts["calibration"].batches(config.batch)),
        config,
        seed=session.settings.seed,
        fixed=frozenset(op for s in session.formats if s.pinned is not None for op in s.ops),
        done=done,
        hooks=hooks,
        ranks=session.ranks,
        more=_more(session),
        # Refits have read the calibration part: on its samples nothing can be better than they are.
        apart=list(session.parts["search"].batches(config.batch))[::2],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What the other ranks need to take part; its tensors are the graph's, the cuts' and the done ones."""

    graph: Mapping[str, Any]
    branches: ChangeRecords
    widths: ChangeRecords
    config: Recover
    done: _Partial | None


def _call(
    changed: Changes, graph: Graph, config: Recover, done: Progressed | None
) -> Parcel[_Call]:
    branches, widths = pack(changed.branches), pack(changed.widths)
    record = _Call(
        graph=graph_to_json(graph),
        branches=branches[0],
        widths=widths[0],
        config=config,
        done=None if done is None else _Partial(parts=done.parts, seconds=done.seconds),
    )
    tensors = {
        "graph": graph_tensors(graph),
        "branches": as_tensors(branches[1]),
        "widths": as_tensors(widths[1]),
        "done": {} if done is None else done.tensors,
    }
    return Parcel(record, {f"{k}/{n}": t for k, own in tensors.items() for n, t in own.items()})


def recover_along(session: Session, body: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take part in rank 0's recovery, whose result is rank 0's.

    Args:
        session: This rank's.
        body: The record that rank 0 has sent, as JSON.
        tensors: Its tensors.
    """
    record = from_json(_Call, body)
    own: dict[str, dict[str, Tensor]] = {"graph": {}, "branches": {}, "widths": {}, "done": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        own[kind][rest] = tensor
    cuts = {
        kind: tuple(unpack(records, as_arrays(own[kind]), session.site_by_name))
        for kind, records in (("branches", record.branches), ("widths", record.widths))
    }
    graph = read_back(graph_from_json(record.graph, own["graph"]), session.graph)
    changed = Changes(branches=cuts["branches"], widths=cuts["widths"])
    teacher = Teacher(
        graph=session.graph, kind=session.kind, counterparts=counterparts_of(session, changed)
    )
    kept = record.done
    done = None if kept is None else Progressed(
        tensors=own["done"], parts=kept.parts, seconds=kept.seconds
    )  # fmt: skip
    _reconstructed(session, teacher, graph, record.config, (done, Hooks()))


def _more(session: Session) -> More | None:
    taught = session.taught
    if taught is None:
        return None
    judged = None if taught.loss is None else Judged(taught.loss, taught.items)
    return More(taught.batches, judged)


def _interrupted(session: Session, key: str) -> Progressed | None:
    kept = session.store.get(_Partial, "recovering", key)
    if kept is None:
        return None
    tensors = _tensors(session.store.arrays("recovering", key))
    return Progressed(tensors=tensors, parts=kept.parts, seconds=kept.seconds)


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _checked(
    before: Graph, after: Graph, recovery: Recovery, quality: Quality, *, has_labels: bool
) -> tuple[Graph, Recovery]:
    """The better one on the search part, which recovery has not seen.

    By the error of the outputs; by the loss of quality first where labels had a say, as those may lead
    away from the original.
    """
    if not recovery.is_kept:
        return before, recovery
    losses = [quality.loss(graph) for graph in (before, after)]
    errors = [quality.error(graph) for graph in (before, after)]
    limit = quality.limit()
    beyond = [limit is not None and loss > limit for loss in losses]
    first = losses if has_labels else [0.0, 0.0]
    is_better = (beyond[1], first[1], errors[1]) < (beyond[0], first[0], errors[0])
    record = replace(
        recovery,
        search_before=losses[0],
        search_after=losses[1],
        is_kept=is_better,
        reason="" if is_better else "no closer to the original on the search part",
    )
    return (after if is_better else before), record


def _changed_tensors(before: Graph, after: Graph) -> dict[str, Tensor]:
    old, new = before.module.state_dict(), after.module.state_dict()
    return {n: t for n, t in new.items() if n not in old or not torch.equal(t, old[n])}


def _with_tensors(graph: Graph, own: Mapping[str, Tensor]) -> Graph:
    """A graph with some tensors replaced.

    Raises:
        StoreError: They are not of this graph.
    """
    if not own:
        return graph
    fresh, tensors = copy_graph(graph.module)
    strange = [n for n, t in own.items() if n not in tensors or tensors[n].shape != t.shape]
    if strange:
        raise StoreError(
            f"recover: the kept tensor {strange[0]} is not of this graph; delete the folder "
            "'recover' of the cache directory and run again"
        )
    module = rebuild(fresh, {**tensors, **own})
    refresh(module)
    return replace(graph, module=module)
