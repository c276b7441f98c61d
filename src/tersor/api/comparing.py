"""Two models, value by value, and each build beside its graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tersor.api.files import open_graph
from tersor.api.verifying import drawn_inputs, flat_inputs
from tersor.artifact.file import ArtifactFile, read_artifact
from tersor.build.build import limit_for, parity
from tersor.capture.detector import split_input
from tersor.capture.module import capture
from tersor.capture.programs import open_model
from tersor.capture.samples import Samples, flatten_item
from tersor.core import registry
from tersor.core.errors import BackendError, ConfigError
from tersor.core.records import BuildChoice
from tersor.graph import meta
from tersor.graph.contracts import Graph
from tersor.graph.ending import ending_at
from tersor.graph.shapes import input_shapes
from tersor.verify.divergence import (
    BuildDivergence,
    Point,
    compare_graphs,
    first_above,
    squared_error,
)

SUFFIX = ".tersor"
_SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What differs between two models.

    Attributes:
        one, other: What was compared.
        limit: Above which normalised squared error two values differ.
        outputs: Output -> the error of the second model's.
        points: Every value that both graphs have, in order.
        first: The first of them that differs; None where none does.
        introduced: The first whose own op makes a difference above the limit.
        builds: Each build in a file beside its own graph.
        notes: What could not be compared, and why.
    """

    one: str
    other: str
    limit: float
    outputs: Mapping[str, float]
    points: tuple[Point, ...]
    first: str | None
    introduced: str | None
    builds: tuple[BuildDivergence, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether no output, of graphs or builds, differs."""
        return all(error <= self.limit for error in self.outputs.values()) and all(
            build.error <= build.limit for build in self.builds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    name: str
    graph: Graph
    artifact: ArtifactFile | None = None
    flat: tuple[Tensor, ...] | None = None  # of a model: what it was captured with


def compare_models(one: Any, other: Any, inputs: Any, limit: float) -> Comparison:
    """See ``tersor.compare``."""
    if not 0 < limit < 1:
        raise ConfigError(f"limit: found {limit}, wanted a normalised squared error in (0, 1)")
    sides = [_opened(side, inputs) for side in ((one,) if other is None else (one, other))]
    flat = _inputs(sides, inputs)
    first, last = sides[0], sides[-1]
    _check_alike(first, last)
    points = () if other is None else compare_graphs(first.graph, last.graph, flat)
    notes: list[str] = []
    builds = [b for side in sides for b in _builds(side, flat, limit, notes)]
    if other is None and not builds:
        raise BackendError(
            f"{first.name}: no build in it runs here: {'; '.join(notes) or 'it has none'}"
        )
    return Comparison(
        one=first.name,
        other=f"the builds of {first.name}" if other is None else last.name,
        limit=limit,
        outputs={} if other is None else _outputs(first.graph, last.graph, flat),
        points=points,
        first=next((p.node for p in points if not p.error <= limit), None),
        introduced=next((p.node for p in points if not p.own <= limit), None),
        builds=tuple(builds),
        notes=tuple(notes),
    )


def _opened(side: Any, inputs: Any) -> _Side:
    if isinstance(side, str | Path) and str(side).endswith(SUFFIX):
        artifact = read_artifact(side)
        graph = open_graph(artifact)
        meta.ensure(graph)
        return _Side(name=Path(side).name, graph=graph, artifact=artifact)
    if inputs is None:
        raise ConfigError("inputs: found none, wanted a batch: a model says nothing of its inputs")
    opened, item = split_input(open_model(side), inputs)
    call, tensors = flatten_item(item, "inputs")
    graph = capture(opened, Samples(call, tensors)).graph
    name = side if isinstance(side, str) else type(side).__name__
    specs = graph.signature.inputs
    flat = [t.to(getattr(torch, s.carrier)) for t, s in zip(tensors, specs, strict=True)]
    return _Side(name=name, graph=graph, flat=tuple(flat))


def _inputs(sides: list[_Side], inputs: Any) -> tuple[Tensor, ...]:
    """Flat inputs of a few samples: as given, else drawn in the calibrated ranges of a file."""
    if inputs is None:
        artifact = next(s.artifact for s in sides if s.artifact is not None)
        return drawn_inputs(artifact)
    known = next((s.flat for s in sides if s.flat is not None), None)
    flat = flat_inputs(sides[0].graph, inputs) if known is None else known
    return tuple(t[:_SAMPLES] for t in flat)


def _check_alike(one: _Side, other: _Side) -> None:
    for what in ("inputs", "outputs"):
        found = [
            [(s.carrier, len(s.shape)) for s in getattr(side.graph.signature, what)]
            for side in (one, other)
        ]
        if found[0] != found[1]:
            raise ConfigError(
                f"{one.name} has the {what} {found[0]} and {other.name} {found[1]} (type, dimensions); "
                f"wanted two models with the same {what}"
            )


def _outputs(one: Graph, other: Graph, flat: tuple[Tensor, ...]) -> dict[str, float]:
    pairs = zip(one.signature.outputs, one.run(flat), other.run(flat), strict=True)
    return {
        spec.name: squared_error(found, wanted) if found.shape == wanted.shape else float("inf")
        for spec, wanted, found in pairs
        if wanted.is_floating_point()
    }


def _builds(
    side: _Side, flat: tuple[Tensor, ...], limit: float, notes: list[str]
) -> list[BuildDivergence]:
    """Each build of a file beside its graph; ``notes`` gets what does not run here."""
    found = []
    for name, choice in {} if side.artifact is None else side.artifact.manifest.choices.items():
        backend: Any = registry.backend(name, choice.device)
        info = backend.describe()
        if not info.available:
            notes.append(f"{side.name}: {name} is not available: {info.reason}; {info.remedy}")
            continue
        loaded = backend.load(side.artifact.sections(name), choice)  # type: ignore[union-attr]
        error = parity(side.graph, loaded, choice.batch, flat)
        least = min(limit, limit_for(side.graph, choice))
        own = (side.graph, backend, choice, flat, least)
        first, looked = (None, ()) if error <= least else _diverging(*own)
        found.append(
            BuildDivergence(
                build=choice.describe(), error=error, limit=least, first=first, looked=looked
            )
        )
    return found


def _diverging(
    graph: Graph, backend: Any, choice: BuildChoice, flat: tuple[Tensor, ...], limit: float
) -> tuple[str | None, tuple[tuple[str, float], ...]]:
    """The first value at which a build leaves its graph, by builds that end early."""
    shapes = input_shapes(graph.signature, choice.batch)

    def error_at(name: str) -> float | None:
        part = ending_at(graph, name)
        try:
            return parity(part, backend.build(part, shapes, choice), choice.batch, flat)
        except BackendError:  # a value that this backend can't give out
            return None

    return first_above(_values(graph), error_at, limit)


def _values(graph: Graph) -> list[str]:
    """Names of the nodes that give one float tensor and that an input reaches.

    A value of constants alone (a weight out of its codes) stands between an op and its reader in the
    graph's order, where a search by halves would take it for proof that the op is right.
    """
    reached: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return [
        n.name
        for n in graph.module.graph.nodes
        if n.op == "call_function"
        and n in reached
        and isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].is_floating_point()
        and n.meta["val"].dim() > 0
    ]
