"""Whether padding changes what a graph computes: tried on real samples, not assumed.

A model that masks what was filled in (attention masks, means over the real tokens) gives the same
outputs; one that does not, gives others and must not be padded.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tersor.build.reference import GraphExecutable
from tersor.core.records import BuildChoice, Signature
from tersor.graph.contracts import Graph
from tersor.graph.routed import Routed
from tersor.graph.shapes import Sizes

# Normalised squared error: sums over more terms, the new ones zero, differ in their order only.
EXACT = 1e-6


def padding_error(graph: Graph, choice: BuildChoice, groups: Iterable[Sequence[Tensor]]) -> float:
    """How far outputs of padded inputs are from those of the inputs themselves.

    Both are computed by torch, so that nothing but the padding differs.

    Args:
        graph: Read only.
        choice: Its buckets say which size is padded to which.
        groups: Flat inputs of samples, each at one size.

    Returns:
        The largest normalised squared error of a float output, in float64; infinite where an
        output of integers or an output's shape differs, or one is not finite.
    """
    plain = GraphExecutable(graph)
    padded = Routed(plain, graph.signature, choice)
    worst = 0.0
    for flat in groups:
        inputs = {s.name: t.numpy() for s, t in zip(graph.signature.inputs, flat, strict=True)}
        found, wanted = padded.run(inputs), plain.run(inputs)
        worst = max(worst, *(_error(found[name], wanted[name]) for name in wanted))
    return worst


def _error(found: object, wanted: object) -> float:
    one, other = torch.as_tensor(found), torch.as_tensor(wanted)
    if one.shape != other.shape:
        return math.inf
    if not other.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    spread = float(other.double().square().mean()) + 1e-30
    error = float((one.double() - other.double()).square().mean()) / spread
    return error if math.isfinite(error) else math.inf


def resized(flat: Sequence[Tensor], signature: Signature, sizes: Sizes) -> tuple[Tensor, ...]:
    """Samples at other sizes: cut off at the end, or begun again where they are too short."""
    found = []
    for spec, tensor in zip(signature.inputs, flat, strict=True):
        new = tensor
        for dim, symbol in enumerate(spec.dynamic):
            if symbol in sizes:
                new = new.index_select(dim, torch.arange(sizes[symbol]) % tensor.shape[dim])
        found.append(new)
    return tuple(found)
