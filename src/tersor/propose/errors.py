"""Errors of edited graphs by real forwards: what an edit does not change is the original's."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.contracts import Graph
from tersor.graph.edit import run_all
from tersor.graph.geometry import (
    constant_error,
    output_error,
    output_spreads,
    sample_sensitivity,
)
from tersor.graph.suffix import Original, Suffix
from tersor.observe.ranks import ALONE, Parcel, RankGroup
from tersor.propose.sampling import (
    Flat,
    Precision,
    by_shape,
    draw,
    gathered,
    mean_error,
    plan_scale,
    spread_order,
)

_ACTIVATION_BYTES = 1 << 29  # of all intermediate results of one chunk of samples
_MOST_SAMPLES = 16  # in a chunk
_EDIT_BYTES = 1 << 28  # of the tensors of all edits that are at hand at a time
_OUTPUT_BYTES = 1 << 28  # of the outputs from which spreads are taken
_STEP = "errors"
_POOL = 4  # times as many samples as may be read are those among which they are drawn


def sampled_errors(  # noqa: PLR0913 - a measurement and its limits
    graph: Graph,
    variants: Mapping[int, Graph],
    batches: Sequence[Flat],
    kind: OutputKind,
    *,
    sites: Mapping[int, str],
    precision: Precision | None = None,
    few: frozenset[int] = frozenset(),
    advance: Callable[[], None] = lambda: None,
    ranks: RankGroup = ALONE,
) -> dict[int, Tensor]:
    """Output errors of each edited graph, over as many samples as it takes to know their mean.

    Args:
        graph: The original.
        variants: Edits of it, where nodes that stay keep their names; made when asked for, and
            again in a later look where not all fit in memory.
        batches: Flat inputs of all samples.
        kind: The output's geometry.
        sites: Variant -> the site that it changes.
        precision: When a mean is known well enough. None: all samples are read.
        few: Variants that are not worth more samples than the least.
        advance: Called once for each variant, when it is done.
        ranks: Who measures variants of the same graph at the same time, all on the same samples; each
            its own variants, maybe none. What a plan loses is estimated from all of them.

    Returns:
        Variant -> errors, one a draw [t], of the same samples in the same order, each times what
        it counts for: their mean is the error.
    """
    original, groups = Original(graph), by_shape(batches)
    count, size = sum(len(flat[0]) for flat in groups), chunk_size(graph)
    rule = precision or Precision(least=max(2, count), most=max(2, count))
    survey = _shared_survey(ranks, lambda: _survey(graph, groups, kind, rule, size))
    read = {i: torch.full((count,), math.nan, dtype=torch.float64) for i in variants}
    found: dict[int, Tensor] = {}
    active = list(variants)
    edits = _Suffixes(original, variants)
    looks = draw(survey.sensitivity, rule)
    for look in looks:
        fresh = survey.pool[look.fresh]
        for suffixes in edits.of(active):
            wanted = {name for suffix in suffixes.values() for name in suffix.reads}
            for flat, rows in gathered(groups, fresh, size):
                before = original.values(flat, wanted)
                for i, suffix in suffixes.items():
                    new, old = suffix.run(flat, before), before[original.output]
                    read[i][rows] = output_error(new, old, kind, survey.spreads).double()
        for i in active:
            found[i] = read[i][survey.pool[look.draws]] * look.weights
        means = {i: float(errors.mean()) for i, errors in found.items()}
        scale, is_over = _scale(ranks, means, sites, is_active=bool(active))
        if is_over:
            break
        done = {
            i for i in active
            if look is looks[-1] or i in few or rule.is_enough(found[i], scale, survey.useless)
        }  # fmt: skip
        edits.drop(done)
        for _ in done:
            advance()
        active = [i for i in active if i not in done]
    return {i: found[i] for i in variants}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """Mean errors of one rank's variants, with their sites, and whether it goes on reading."""

    means: tuple[float, ...]
    sites: tuple[str, ...]
    is_active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    scale: float
    is_over: bool


def _scale(
    ranks: RankGroup, means: Mapping[int, float], sites: Mapping[int, str], *, is_active: bool
) -> tuple[float, bool]:
    """What a plan that changes every site loses, from all ranks' variants; and if all are done."""
    if not ranks.is_shared:
        return plan_scale(means, sites), not is_active
    own = _Means(
        means=tuple(means.values()), sites=tuple(sites[i] for i in means), is_active=is_active
    )
    parts = ranks.collect(_Means, Parcel(own), _STEP)

    def join() -> Parcel[_Scale]:
        rows = [row for p in parts for row in zip(p.record.means, p.record.sites, strict=True)]
        both = (
            {i: mean for i, (mean, _) in enumerate(rows)},
            {i: s for i, (_, s) in enumerate(rows)},
        )
        is_over = not any(p.record.is_active for p in parts)
        return Parcel(_Scale(scale=plan_scale(*both), is_over=is_over))

    found = ranks.first(_Scale, join, _STEP).record
    return found.scale, found.is_over


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the original says of the samples before anything is changed.

    Attributes:
        pool: Samples among which those that are read are drawn.
        sensitivity: How much a change shows on each of them.
        spreads: What squared errors are divided by.
        useless: The error of an answer that does not look at the input.
    """

    pool: Tensor
    sensitivity: Tensor
    spreads: tuple[float, ...]
    useless: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _SurveyRecord:
    """The plain part of a survey."""

    spreads: tuple[float, ...]
    useless: float


def _shared_survey(ranks: RankGroup, make: Callable[[], _Survey]) -> _Survey:
    """One rank's survey for all of them: errors on other samples would not be paired."""
    if not ranks.is_shared:
        return make()

    def parcel() -> Parcel[_SurveyRecord]:
        made = make()
        record = _SurveyRecord(spreads=made.spreads, useless=made.useless)
        return Parcel(record, {"pool": made.pool, "sensitivity": made.sensitivity})

    found = ranks.first(_SurveyRecord, parcel, _STEP)
    pool, sensitivity = found.tensors["pool"], found.tensors["sensitivity"]
    return _Survey(pool, sensitivity, found.record.spreads, found.record.useless)


def _survey(
    graph: Graph, groups: Sequence[Flat], kind: OutputKind, rule: Precision, size: int
) -> _Survey:
    """One pass of the original; of squared errors, which know no sure samples, over the first ones."""
    count = sum(len(flat[0]) for flat in groups)
    pool = spread_order(count)[: _POOL * rule.most].sort().values
    asked = pool if kind == "logits" else spread_order(count)[: rule.least]
    sensitivity = torch.ones(count, dtype=torch.float64)
    kept: list[tuple[Tensor, ...]] = []
    room = _OUTPUT_BYTES
    for flat, rows in gathered(groups, asked, size):
        outputs = graph.run(tuple(t.clone() for t in flat))
        sensitivity[rows] = sample_sensitivity(outputs, kind, len(rows))
        if not kept or room > 0:
            kept.append(outputs)
            room -= sum(t.numel() * t.element_size() for t in outputs)
    return _Survey(pool, sensitivity[pool], output_spreads(kept), constant_error(kept, kind))


class _Suffixes:
    """What the edits change; as many as fit in memory stay at hand from one look to the next."""

    def __init__(self, original: Original, variants: Mapping[int, Graph]) -> None:
        self._original, self._variants = original, variants
        self._kept: dict[int, Suffix] = {}
        self._room = _EDIT_BYTES

    def of(self, wanted: Iterable[int]) -> Iterator[dict[int, Suffix]]:
        """Those of some variants, as many at a time as fit in memory."""
        found: dict[int, Suffix] = {}
        size = 0
        for i in wanted:
            suffix = self._kept.get(i)
            if suffix is None:
                suffix = self._original.suffix(self._variants[i])
                if suffix.own_bytes <= self._room:
                    self._kept[i] = suffix
                    self._room -= suffix.own_bytes
            found[i] = suffix
            size += 0 if i in self._kept else suffix.own_bytes
            if size > _EDIT_BYTES:
                yield found
                found, size = {}, 0
        if found:
            yield found

    def drop(self, done: Iterable[int]) -> None:
        """Make room."""
        for i in done:
            suffix = self._kept.pop(i, None)
            self._room += 0 if suffix is None else suffix.own_bytes


def chunks(graph: Graph, flat: Flat, others: Sequence[Flat] = ()) -> list[Flat]:
    """Samples in chunks of one shape whose intermediate results fit in memory."""
    size = chunk_size(graph)
    return [
        tuple(t[i : i + size] for t in group)
        for group in (flat, *others)
        for i in range(0, group[0].shape[0], size)
    ]


def chunk_size(graph: Graph) -> int:
    """Samples whose intermediate results take at most half a gigabyte."""
    env = run_all(graph.module, graph.example)
    computed = (env[n.name] for n in graph.module.graph.nodes if n.op == "call_function")
    size = sum(v.numel() * v.element_size() for v in computed if isinstance(v, Tensor))
    per_sample = size / graph.example[0].shape[0]
    return max(1, min(_MOST_SAMPLES, int(_ACTIVATION_BYTES / max(per_sample, 1.0))))


def with_errors(candidate: Candidate, errors: Tensor) -> Candidate:
    """A candidate with the mean of its errors over samples [t] and that mean's standard error."""
    mean, deviation = mean_error(errors)
    return replace(candidate, error=mean, error_se=deviation, samples=len(errors))
