"""Artifacts: putting a result into one file, and taking it out again."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor._version import __version__
from tersor.api.proposing import Offers
from tersor.api.session import Session
from tersor.artifact.file import Artifact, ArtifactFile, artifact_bytes
from tersor.artifact.manifest import Manifest, Range, Ranges
from tersor.artifact.tensors import RawTensor
from tersor.build.build import Built
from tersor.core.jsonable import dumps, to_json
from tersor.core.records import BuildChoice, Level, Plan, Prices, Site, TensorSpec, Verdict
from tersor.graph.contracts import Graph
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.plan.problem import native_levels
from tersor.report.brief import chosen_alone
from tersor.report.record import Report

_REPORT = "report"
_RANGE_SAMPLES = 16  # whose outputs show the range
_SIZE_ATTEMPTS, _TRIES_PER_TEXT = 40, 4
_REPORT_SHARE = 1.9  # all of a report over its candidates, prices and sites, both deflated
# Of a report in brief: as much, and what does not depend on the sites; on ResNet-20 about 1 kB too much, as what
# int8 ops add to a graph and its build is counted nowhere else.
_BRIEF_SHARE, _BRIEF_BYTES, _SITE_BYTES = 1.5, 1200, 60
_PLAN_SHARE = (
    1.2  # the same of a plan, whose graph and build are counted as they are: on ResNet-20 1.0
)
_WHOLE_SHARE = 0.05  # of a budget of bytes: what a whole report may take of it


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the file says beside the model."""

    created: str = ""
    plan: Plan | None = None
    verdict: Verdict | None = None
    report: Report | None = None


_NO_FACTS = Facts()


def pack_artifact(
    session: Session,
    graph: Graph,
    choice: BuildChoice,
    sections: Mapping[str, bytes],
    facts: Facts,
) -> Artifact:
    """A result as an artifact in memory."""
    manifest = Manifest(
        tersor=__version__,
        created=facts.created,
        signature=graph.signature,
        model=session.model_hash,
        choices={choice.backend: choice},
        plan=facts.plan,
        verdict=facts.verdict,
        ranges=ranges_of(session),
        metadata={} if facts.report is None else {_REPORT: to_json(facts.report)},
    )
    tensors = {n: _raw(t) for n, t in graph_tensors(graph).items() if n not in graph.packed}
    return Artifact(
        manifest=manifest,
        graph=graph_to_json(graph),
        tensors=tensors,
        builds={choice.backend: dict(sections)},
        packed=graph.packed,
    )


def _raw(tensor: Tensor) -> RawTensor:
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return RawTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def ranges_of(session: Session) -> Ranges:
    """What calibration saw of each float input and output; ids below the embedding's rows; read once a session."""
    if not session.ranges:
        session.ranges["original"] = _ranges(session)
    return session.ranges["original"]


def _ranges(session: Session) -> Ranges:
    specs, part = session.graph.signature, session.parts["calibration"]
    columns = zip(*part.groups, strict=True)
    inputs = {
        spec.name: found
        for spec, tensors in zip(specs.inputs, columns, strict=True)
        if (found := _input_range(session, spec, tensors)) is not None
    }
    results = [session.graph.run(flat) for flat in part.limited(_RANGE_SAMPLES).batches(16)]
    outputs = {
        spec.name: _range(tensors)
        for spec, tensors in zip(specs.outputs, zip(*results, strict=True), strict=True)
        if tensors[0].is_floating_point() and all(t.numel() for t in tensors)
    }
    return Ranges(inputs=inputs, outputs=outputs, spreads=_nan_spreads(session))


def _nan_spreads(session: Session) -> dict[str, tuple[str, ...]]:
    """Float input -> the outputs that are all NaN in the original where the input is all NaN."""
    specs = session.graph.signature
    flat = [t[:1].clone() for t in session.parts["calibration"].groups[0]]
    found = {}
    for i, (spec, tensor) in enumerate(zip(specs.inputs, flat, strict=True)):
        if not tensor.is_floating_point():
            continue
        given = [*flat[:i], torch.full_like(tensor, math.nan), *flat[i + 1 :]]
        try:
            results = session.graph.run(given)
        except (RuntimeError, IndexError):  # as where an index is computed from it
            continue
        lost = [s.name for s, t in zip(specs.outputs, results, strict=True) if _is_nan(t)]
        if lost:
            found[spec.name] = tuple(lost)
    return found


def _is_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(torch.isnan(tensor).all())


def _range(tensors: Sequence[Tensor]) -> Range:
    return Range(
        low=min(float(t.min()) for t in tensors), high=max(float(t.max()) for t in tensors)
    )


def _input_range(session: Session, spec: TensorSpec, tensors: Sequence[Tensor]) -> Range | None:
    if not all(t.numel() for t in tensors):
        return None
    if tensors[0].is_floating_point():
        return _range(tensors)
    rows = [
        s.shape[0]
        for s in session.sites
        if s.op_kind == "embedding" and _reads(session, s.ops, spec.name)
    ]
    return Range(low=0.0, high=float(min(rows) - 1)) if rows else None


def _reads(session: Session, ops: tuple[str, ...], name: str) -> bool:
    nodes = {n.name: n for n in session.graph.module.graph.nodes}
    return any(source.name == name for op in ops for source in nodes[op].all_input_nodes)


def artifact_size(
    session: Session,
    graph: Graph,
    built: Built,
    facts: Facts = _NO_FACTS,
) -> int:
    """Bytes of the file that ``save`` writes."""
    sections = built.executable.serialize()
    return len(artifact_bytes(pack_artifact(session, graph, built.choice, sections, facts)))


def report_size(*records: Any) -> int:
    """About what a report takes in the file, from its largest records: 0 to 15 % too much."""
    return round(_REPORT_SHARE * _deflated(records))


def _deflated(records: Sequence[Any]) -> int:
    return len(zlib.compress(dumps(list(records)).encode(), 9))


def carried_size(
    offers: Offers,
    prices: Prices,
    sites: Sequence[Site],
    most: float | None,
    assignment: Mapping[str, Level] | None = None,
) -> int:
    """About what the report in the file takes, whole or in brief; ``most``: the file's budget.

    ``assignment``: a plan's levels; while there is none, of each site the level that says most.
    """
    if not is_brief(offers, prices, sites, most):
        return report_size(offers.candidates, prices, sites)
    choice = prices.baseline.choice
    assert choice is not None
    native = native_levels(offers.by_site(), choice.precision, {})
    longest = {
        site: max(rows, key=lambda c: len(dumps(c))).level
        for site, rows in offers.by_site().items()
    }
    chosen = {site: (assignment or longest).get(site, native[site]) for site in longest}
    levels = {site: (level, native[site]) for site, level in chosen.items()}
    table = prices.tables[0].choice if prices.tables else choice
    records = [*chosen_alone(offers.candidates, prices, table, levels), sites]
    share = _BRIEF_SHARE if assignment is None else _PLAN_SHARE
    return round(share * _deflated(records)) + _BRIEF_BYTES + _SITE_BYTES * len(levels)


def is_brief(offers: Offers, prices: Prices, sites: Sequence[Site], most: float | None) -> bool:
    """Whether the file carries its report in brief: a whole one would take much of its budget."""
    if most is None:
        return False
    return report_size(offers.candidates, prices, sites) > _WHOLE_SHARE * most


def final_bytes(
    session: Session,
    graph: Graph,
    built: Built,
    facts: Facts,
) -> bytes:
    """The whole file; the size that its verdict states is its own."""
    sections = built.executable.serialize()
    created = facts.created
    data = b""
    # The digits of the size are part of the size, and the deflated text does not grow evenly:
    # where no size states itself, spaces behind the date make another text.
    for attempt in range(_SIZE_ATTEMPTS):
        padded = replace(facts, created=created + " " * (attempt // _TRIES_PER_TEXT))
        data = artifact_bytes(pack_artifact(session, graph, built.choice, sections, padded))
        verdict, report = facts.verdict, facts.report
        if verdict is None or report is None or len(data) == verdict.size_bytes:
            break
        verdict = replace(verdict, size_bytes=len(data))
        facts = replace(facts, verdict=verdict, report=replace(report, verdict=verdict))
    return data


def open_graph(artifact: ArtifactFile) -> Graph:
    """The artifact's graph, for torch."""
    tensors = {name: _tensor(raw) for name, raw in artifact.tensors.items()}
    return replace(graph_from_json(artifact.graph, tensors), packed=artifact.packed)


def _tensor(raw: RawTensor) -> Tensor:
    dtype = getattr(torch, raw.dtype)
    if not len(raw.data):
        return torch.zeros(raw.shape, dtype=dtype)
    buffer = np.frombuffer(raw.data, dtype=np.uint8).copy()
    return torch.from_numpy(buffer).view(dtype).reshape(raw.shape)


def stored_report(artifact: ArtifactFile) -> Any:
    """The report as JSON values, or None."""
    return artifact.manifest.metadata.get(_REPORT)
