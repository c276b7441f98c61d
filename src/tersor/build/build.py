"""Lowers a graph through a backend, and proves that the build computes what the graph computes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.build.padding import EXACT, resized
from tersor.core.errors import ParityError
from tersor.core.records import BuildChoice, Signature
from tersor.graph.contracts import Backend, Executable, Graph, Shapes
from tersor.graph.routed import routed
from tersor.graph.shapes import Sizes, input_shapes, open_sizes

# Normalised squared error of the build against the graph, in float32. Without quantisers only the
# order of sums differs; with them a value at the border of two codes may fall to either side.
_ROUNDED = 1e-2
_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Built:
    """An executable and how far it is from its graph."""

    executable: Executable
    choice: BuildChoice
    difference: float  # normalised squared error


def shapes_of(signature: Signature, batch: int, sizes: Sizes | None = None) -> Shapes:
    """Input shapes for one batch size; what the signature leaves open stays so unless given."""
    return input_shapes(signature, batch, open_sizes(signature) | dict(sizes or {}))


def build(
    graph: Graph,
    backend: Backend,
    choice: BuildChoice,
    flat: Sequence[Tensor],
    others: Iterable[Sequence[Tensor]] = (),
) -> Built:
    """Build a graph and compare the build with the graph on a few samples.

    Args:
        graph: Compressed or not.
        backend: Builds it.
        choice: Precision, threads, batch and options.
        flat: Flat inputs of a few samples, at the sizes of the graph's example.
        others: The same at other sizes, where the signature leaves some open. Every bucket of
            the choice is compared as well, at its size and at the smallest that is padded to it.

    Raises:
        BackendError: The backend can't build it.
        ConfigError: Buckets that do not fit the graph.
        ParityError: The build computes something else than the graph.
    """
    shapes = shapes_of(graph.signature, choice.batch)
    executable: Executable = routed(backend.build(graph, shapes, choice), graph.signature, choice)
    groups = (flat, *others, *_bucketed(graph.signature, choice, flat))
    difference = max(parity(graph, executable, choice.batch, group) for group in groups)
    limit = limit_for(graph, choice)
    if not difference <= limit:
        raise ParityError(
            f"the {choice.describe()} build differs from its graph: normalised squared error "
            f"{difference:.2e}, wanted at most {limit:g}; the backend computes these formats "
            "otherwise on this machine"
        )
    return Built(executable, choice, difference)


def limit_for(graph: Graph, choice: BuildChoice) -> float:
    """The largest normalised squared error of a build against its graph that counts as none."""
    return _ROUNDED if choice.rounds or _is_quantized(graph) else EXACT


def _bucketed(
    signature: Signature, choice: BuildChoice, flat: Sequence[Tensor]
) -> Iterable[tuple[Tensor, ...]]:
    for bucket in choice.buckets:
        yield resized(flat, signature, bucket.sizes)
        if bucket.pads:
            yield resized(flat, signature, bucket.least)


def parity(graph: Graph, executable: Executable, batch: int, flat: Sequence[Tensor]) -> float:
    """Normalised squared error of the build's float outputs against the graph's."""
    count = max(1, -(-min(_SAMPLES, flat[0].shape[0]) // batch))
    worst = 0.0
    for index in range(count):
        rows = torch.arange(index * batch, (index + 1) * batch) % flat[0].shape[0]
        inputs = [t[rows] for t in flat]
        named = {
            spec.name: t.numpy() for spec, t in zip(graph.signature.inputs, inputs, strict=True)
        }
        found = executable.run(named)
        for spec, wanted in zip(graph.signature.outputs, graph.run(inputs), strict=True):
            if wanted.is_floating_point():
                got = torch.from_numpy(found[spec.name]).double().reshape(wanted.shape)
                spread = float(wanted.double().square().mean()) + 1e-30
                error = float((got - wanted.double()).square().mean()) / spread
                worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _is_quantized(graph: Graph) -> bool:
    return any("quantize" in str(n.target) for n in graph.module.graph.nodes)
