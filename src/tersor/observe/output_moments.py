"""What the model feels of each output of a layer: the second moment of its gradient there.

To second order a change d of a layer's output changes the model's by d^T J^T F J d / 2, J leading from
the layer to the output and F being the metric of the output's geometry. With F = sum_k v_k v_k^T one
backward pass from each v_k gives J^T v_k, and their products sum to what is wanted. Of logits F is
diag(p) - p p^T = sum_k p_k (e_k - p)(e_k - p)^T: one pass a class, no label and no chance (the exact
expectation over the model's own classes). Of many classes, and of other outputs, v are random.

Source: Martens 2020, arXiv:1412.1193, section 9.2 (the generalised Gauss-Newton matrix of a softmax).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tersor.core.records import OutputKind
from tersor.graph.contracts import Graph
from tersor.graph.edit import execute
from tersor.graph.geometry import output_spreads
from tersor.graph.mutation import has_mutation
from tersor.graph.operators import WeightedOp, output_rows, weighted_ops
from tersor.observe.statistics import token_mask

# Classes up to which the expectation over them is exact; a backward pass takes as long as a forward one.
MOST_CLASSES = 16
DRAWS = 8  # of random vectors, where there are more
Flat = tuple[Tensor, ...]
Felt = Callable[[], Mapping[str, Tensor]]  # G by op, worked out when it is first asked for


def output_moments(
    graph: Graph, batches: Sequence[Flat], kind: OutputKind, *, seed: int
) -> dict[str, Tensor]:
    """G of every linear layer and convolution, by op: mean over samples, summed over positions [g, m, m].

    Args:
        graph: The original; only read.
        batches: Flat inputs of a few samples.
        kind: The output's geometry.
        seed: Of the random vectors and, where a sample has several positions, of their signs.

    Returns:
        Nothing where there is no backward pass: a graph that writes in place, or an op without a
        derivative. A layer that no output depends on has zeros.
    """
    if has_mutation(graph.module.graph):
        return {}
    ops = [op for op in weighted_ops(graph.module) if op.kind != "embedding"]
    spreads = output_spreads([graph.run(tuple(t.clone() for t in flat)) for flat in batches])
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor] = {}
    for flat in batches:
        try:
            with torch.enable_grad():
                for name, part in _of_batch(graph, flat, ops, (kind, spreads, generator)):
                    total[name] = total[name] + part if name in total else part
        except (RuntimeError, NotImplementedError):  # an op without a derivative
            return {}
    count = sum(len(flat[0]) for flat in batches)
    return {name: value / max(1, count) for name, value in total.items()}


def felt_by(
    graph: Graph, batches: Sequence[Flat], kind: OutputKind, *, seed: int, samples: int
) -> Felt:
    """The same of the first samples, worked out at the first call."""

    @cache
    def felt() -> Mapping[str, Tensor]:
        taken: list[Flat] = []
        for flat in batches:
            room = samples - sum(len(other[0]) for other in taken)
            if room > 0:
                taken.append(tuple(t[:room] for t in flat))
        return output_moments(graph, taken, kind, seed=seed)

    return felt


def moment_at(ops: Sequence[str], felt: Felt) -> Tensor | None:
    """G of a site: the sum over its ops; None where one of them has none."""
    found = [felt().get(op) for op in ops]
    known = [value for value in found if value is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(found) else None


def _of_batch(
    graph: Graph,
    flat: Flat,
    ops: Sequence[WeightedOp],
    probing: tuple[OutputKind, Sequence[float], torch.Generator],
) -> Iterator[tuple[str, Tensor]]:
    kind, spreads, generator = probing
    values, outputs = _recorded(graph, flat, {op.node.name for op in ops})
    mask = token_mask(graph.signature, flat)
    felt = [(y, spread) for y, spread in zip(outputs, spreads, strict=True) if y.requires_grad]
    for y, spread in felt:
        for probe in _probes(y.detach(), kind, spread, generator):
            found: Any = torch.autograd.grad(
                (y.double() * probe).sum(),
                list(values.values()),
                allow_unused=True,
                retain_graph=True,
            )
            gradients = dict(zip(values, found, strict=True))
            for op in ops:
                own = gradients.get(op.node.name)
                if own is not None:
                    rows = output_rows(own, op, mask).double()  # [t, g, m]
                    yield op.node.name, torch.einsum("tgm,tgk->gmk", rows, rows)


def _recorded(
    graph: Graph, flat: Flat, wanted: set[str]
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """A forward pass with gradients from the wanted nodes on: their values, and the outputs."""
    values: dict[str, Tensor] = {}
    env: dict[str, object] = {}
    stream = iter(flat)
    result: Any = ()
    for node in graph.module.graph.nodes:
        is_input = node.op == "placeholder"
        value = next(stream) if is_input else execute(graph.module, node, env)
        if node.name in wanted and isinstance(value, Tensor):
            value = value if value.requires_grad else value.detach().requires_grad_()
            values[node.name] = value
        env[node.name] = value
        result = value if node.op == "output" else result
    return values, tuple(result)


def _probes(
    y: Tensor, kind: OutputKind, spread: float, generator: torch.Generator
) -> Iterator[Tensor]:
    """Vectors for each sample whose products sum to the metric of the output's error."""
    y = y.double()
    if kind != "logits":
        scale = math.sqrt(DRAWS * y[0].numel() * max(spread, 1e-30))
        for _ in range(DRAWS):
            yield torch.randn(y.shape, generator=generator, dtype=torch.float64) / scale
        return
    dim = 1 if y.dim() >= 4 else -1
    p = y.softmax(dim)
    classes = y.shape[dim]
    positions = y[0].numel() // classes
    size = math.sqrt(2 * positions)  # the divergence is half of the form
    if classes > MOST_CLASSES:
        for _ in range(DRAWS):
            noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            centre = (p.sqrt() * noise).sum(dim, keepdim=True)
            yield (p.sqrt() * noise - p * centre) / (size * math.sqrt(DRAWS))
        return
    for k in range(classes):
        own = p.select(dim, k).unsqueeze(dim)
        one = torch.zeros_like(p)
        one.select(dim, k).fill_(1.0)
        # Positions of a sample must not add up: their signs are drawn.
        sign = torch.ones_like(own)
        if positions > 1:
            sign = torch.randint(0, 2, own.shape, generator=generator).double() * 2 - 1
        yield own.sqrt() * (one - p) * sign / size
