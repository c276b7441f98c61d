"""An artifact's build against its graph, and against the original where there is one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.api.files import open_graph
from tersor.artifact.file import ArtifactFile
from tersor.capture.detector import CORE_PARAMETERS, split_detector
from tersor.capture.module import evaluation_mode
from tersor.capture.programs import Model, as_module, open_model
from tersor.capture.structures import describe
from tersor.capture.weights import float_type
from tersor.core.errors import DataError
from tersor.core.records import Check, OutputKind, Structure
from tersor.core.structure import bind, places, unflatten
from tersor.graph.contracts import Graph
from tersor.graph.geometry import sample_agreement
from tersor.graph.shapes import Sizes
from tersor.runtime.runner import Runner
from tersor.runtime.tensors import to_array

_SAMPLES = 4
# Normalised squared error; a value between two codes may fall to either side.
_ROUNDED = 1e-2


def drawn_inputs(
    artifact: ArtifactFile, seed: int = 0, sizes: Sizes | None = None
) -> tuple[Tensor, ...]:
    """Random flat inputs within the calibrated ranges, at the example's sizes or others."""
    generator = np.random.default_rng(seed)
    ranges = artifact.manifest.ranges.inputs
    drawn = []
    for spec in artifact.manifest.signature.inputs:
        shape = [
            _SAMPLES if size is None else (sizes or {}).get(spec.symbol(dim), size)
            for dim, size in enumerate(spec.shape)
        ]
        dtype = getattr(torch, spec.carrier)
        known = ranges.get(spec.name)
        if dtype.is_floating_point:
            low, high = (known.low, known.high) if known else (0.0, 1.0)
            values = torch.from_numpy(generator.uniform(low, high, shape)).to(dtype)
        else:
            top = int(known.high) + 1 if known else 2
            values = torch.from_numpy(generator.integers(1 if top > 1 else 0, top, shape)).to(dtype)
        drawn.append(values)
    return tuple(drawn)


def compare_build(
    artifact: ArtifactFile, runner: Runner, model: Any, inputs: Mapping[str, Any] | None
) -> list[Check]:
    """Run build, graph and original on the same inputs."""
    graph = open_graph(artifact)
    flat = drawn_inputs(artifact) if inputs is None else given_inputs(graph, inputs)
    wanted = graph.run(flat)
    found = _run(runner, graph, flat)
    pairs = [(found, wanted)]
    if inputs is None:  # every build that the file asks for
        for bucket in (b for c in artifact.manifest.choices.values() for b in c.buckets):
            own = drawn_inputs(artifact, sizes=bucket.least)
            pairs.append((_run(runner, graph, own), graph.run(own)))
    checks = [_difference("build against graph", pairs)]
    if model is not None:
        kind = _kind(artifact)
        leaves: list[Tensor] = []
        original = as_module(_captured(model, graph))
        dtype = float_type(original)
        given = tuple(t.to(dtype) if t.is_floating_point() else t for t in flat)
        args, kwargs = _arguments(graph, given)
        with evaluation_mode(original), torch.no_grad():
            describe(original(*args, **kwargs), leaves)
        agreement = float(sample_agreement(found, leaves, kind).mean())
        verdict = artifact.manifest.verdict
        promised = 0.0 if verdict is None else verdict.agreement
        note = f"{kind}, {flat[0].shape[0]} samples; {promised:.4f} was measured on the test part"
        checks.append(
            Check(
                name="agreement with the original",
                wanted=promised,
                found=agreement,
                status="unknown" if inputs is None else _holds(agreement, promised),
                note=note,
            )
        )
    return checks


def _captured(model: Any, graph: Graph) -> Model:
    """The part of a model that was captured: of a detector its core."""
    opened = open_model(model)
    detector = split_detector(opened)
    if detector is None or graph.signature.parameter_names != CORE_PARAMETERS:
        return opened
    return detector.core


def _holds(found: float, promised: float) -> Any:
    return "pass" if found >= promised - 0.05 else "fail"  # other samples, another mean


def _kind(artifact: ArtifactFile) -> OutputKind:
    verdict = artifact.manifest.verdict
    return "values" if verdict is None else verdict.output_kind


def given_inputs(graph: Graph, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Flat inputs from arrays by name, or in order where no name is the graph's.

    Raises:
        DataError: One is missing.
    """
    names = [spec.name for spec in graph.signature.inputs]
    if len(inputs) == len(names) and not set(inputs) & set(names):  # arrays without names
        inputs = dict(zip(names, inputs.values(), strict=True))
    missing = [name for name in names if name not in inputs]
    if missing:
        raise DataError(f"inputs: {missing} are missing; the model takes {names}")
    return tuple(
        torch.from_numpy(np.ascontiguousarray(inputs[spec.name])).to(getattr(torch, spec.carrier))
        for spec in graph.signature.inputs
    )


def flat_inputs(graph: Graph, item: Any) -> tuple[Tensor, ...]:
    """One batch as a graph's flat inputs, checked as a runner checks them.

    Args:
        graph: What takes them.
        item: As the model is called, or arrays by input name.

    Raises:
        DataError: Other arguments, shapes or kinds of numbers than the graph's.
    """
    specs = graph.signature.inputs
    leaves: Sequence[Any]
    if isinstance(item, Mapping) and all(isinstance(v, np.ndarray) for v in item.values()):
        leaves = given_inputs(graph, item)
    elif isinstance(item, Mapping):
        leaves = bind(graph.signature, (), item)
    else:
        leaves = bind(graph.signature, item if isinstance(item, tuple) else (item,), {})
    given = zip(leaves, specs, places(graph.signature), strict=True)
    arrays = [to_array(leaf, spec, place) for leaf, spec, place in given]
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _run(runner: Runner, graph: Graph, flat: tuple[Tensor, ...]) -> list[Tensor]:
    args, kwargs = _arguments(graph, flat)
    leaves: list[Tensor] = []
    describe(runner(*args, **kwargs), leaves)
    return leaves


def _arguments(graph: Graph, flat: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = graph.signature
    both = Structure(kind="tuple", children=(signature.args, signature.kwargs))
    args, kwargs = unflatten(both, list(flat))
    return tuple(args), dict(kwargs)


def _difference(name: str, pairs: list[tuple[list[Tensor], tuple[Tensor, ...]]]) -> Check:
    worst = 0.0
    for new, old in ((new, old) for pair in pairs for new, old in zip(*pair, strict=True)):
        if old.is_floating_point():
            spread = float(old.double().square().mean()) + 1e-30
            worst = max(worst, float((new.double() - old.double()).square().mean()) / spread)
    status: Any = "pass" if worst <= _ROUNDED else "fail"
    return Check(
        name=name, wanted=_ROUNDED, found=worst, status=status, note="normalised squared error"
    )
