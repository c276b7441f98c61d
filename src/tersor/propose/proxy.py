"""What one layer's own error and the output's gradient predict: cheap, and only to thin the list.

To second order, a change d of a layer's output changes the model's by d^T J^T F J d / 2, where J
leads from that layer to the output and F is the metric of the output's geometry. Changes of
different channels and positions are taken as independent, so that what is left is, for each
channel, the mean squared change times the mean squared gradient: ``sum_c E[d_c^2] G_cc``. One
backward pass of a random vector with covariance F gives G for all layers at once.

Source: Hassibi and Stork 1993; Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852, the trace as a weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.contracts import Graph, SiteChange, SiteStatistics, WidthStatistics
from tersor.graph.edit import execute
from tersor.graph.factors import product
from tersor.graph.geometry import constant_error, output_spreads
from tersor.graph.mutation import has_mutation
from tersor.graph.operators import WeightedOp, weighted_ops
from tersor.graph.quantizer import rounded
from tersor.propose.sampling import Flat

# A second-order prediction is far too high for large changes: what it calls hopeless must be so
# by a wide margin, and what dominates must, too.
_HOPELESS = 100.0
_DOMINATES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What the output feels of each layer.

    Attributes:
        by_op: Op -> mean over samples of the squared gradient, summed over positions, by output
            channel [c]. Empty where there is no backward pass.
        useless: The error of an answer that does not look at the input.
        reason: Why there is no backward pass.
    """

    by_op: Mapping[str, Tensor] = field(default_factory=dict)
    useless: float = math.inf
    reason: str = ""


def output_gradients(
    graph: Graph, batches: Sequence[Flat], kind: OutputKind, *, seed: int
) -> Gradients:
    """One backward pass a batch, from a random vector with the covariance of the output's metric.

    Args:
        graph: The original; only read.
        batches: Flat inputs of a few samples.
        kind: The output's geometry.
        seed: Of the random vectors.
    """
    outputs = [graph.run(tuple(t.clone() for t in flat)) for flat in batches]
    useless = constant_error(outputs, kind)
    if has_mutation(graph.module.graph):
        return Gradients(useless=useless, reason="it writes in place")
    ops = [op for op in weighted_ops(graph.module) if op.kind != "embedding"]
    spreads = output_spreads(outputs)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    count = 0
    for flat in batches:
        try:
            found = _backward(graph, flat, ops, kind, spreads, generator)
        except (RuntimeError, NotImplementedError) as error:  # an op without a derivative
            return Gradients(useless=useless, reason=str(error).splitlines()[0])
        for name, squares in found.items():
            sums[name] = sums.get(name, torch.zeros(())) + squares
        count += len(flat[0])
    return Gradients(by_op={n: s / max(1, count) for n, s in sums.items()}, useless=useless)


def _backward(
    graph: Graph,
    flat: Flat,
    ops: Sequence[WeightedOp],
    kind: OutputKind,
    spreads: Sequence[float],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Op -> squared gradients, summed over samples and positions [c]."""
    named = {op.node.name: op for op in ops}
    values: dict[str, Tensor] = {}
    env: dict[str, object] = {}
    stream = iter(flat)
    result: Any = ()
    with torch.enable_grad():
        for node in graph.module.graph.nodes:
            is_input = node.op == "placeholder"
            value = next(stream) if is_input else execute(graph.module, node, env)
            if node.name in named and isinstance(value, Tensor):
                value = value if value.requires_grad else value.detach().requires_grad_()
                values[node.name] = value
            env[node.name] = value
            result = value if node.op == "output" else result
        pairs = [
            (y, _probe(y.detach(), kind, spread, generator))
            for y, spread in zip(result, spreads, strict=True)
            if y.requires_grad and y.dim()  # one number for all samples says nothing of each
        ]
        total = torch.stack([(y.double() * v).sum() for y, v in pairs]).sum()
        found: Any = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    return {
        name: torch.zeros(()) if g is None else _by_channel(g, named[name]).square().sum(0)
        for (name, g) in zip(values, found, strict=True)
    }


def _probe(y: Tensor, kind: OutputKind, spread: float, generator: torch.Generator) -> Tensor:
    """A random vector for each sample, whose covariance is the metric of the output's error."""
    y = y.double()
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    if kind != "logits":
        return noise / math.sqrt(y[0].numel() * max(spread, 1e-30))
    dim = 1 if y.dim() >= 4 else -1
    p = y.softmax(dim)
    positions = y[0].numel() / y.shape[dim]
    mean = (p.sqrt() * noise).sum(dim, keepdim=True)
    return (p.sqrt() * noise - p * mean) / math.sqrt(2 * positions)  # KL is half of it


def _by_channel(gradient: Tensor, op: WeightedOp) -> Tensor:
    moved = gradient.double() if op.window is None else gradient.double().movedim(1, -1)
    return moved.reshape(-1, moved.shape[-1])


def format_proxy(
    change: SiteChange, statistics: SiteStatistics, gradients: Gradients
) -> float | None:
    """What a change of one weight, and of how its input is seen, should cost.

    From the sample of rows that the statistics hold: the layer is run on them as it was and as it
    is changed. None where they hold none, or where there are no gradients.
    """
    known = [gradients.by_op[op] for op in change.site.ops if op in gradients.by_op]
    if not known or change.site.op_kind == "embedding" or not len(statistics.rows().original):
        return None
    moved = layer_change(change, statistics)
    return float(sum((moved * squares).sum() for squares in known))


def layer_change(change: SiteChange, statistics: SiteStatistics) -> Tensor:
    """Mean squared change of a layer's output on its row sample, by output channel [c]."""
    shape = statistics.weight.shape
    rows = statistics.rows().original.double()  # [t, g, n]
    old = torch.einsum("tgn,gmn->tgm", rows, statistics.weight)
    seen = rows
    quantizer = change.quantizer
    if quantizer is not None and quantizer.inverse_scale is not None:
        factor = quantizer.inverse_scale.double().reshape(shape[0], -1)
        factor = factor.repeat_interleave(shape[2] // factor.shape[1], dim=1)
        seen = rounded(rows * factor, replace(quantizer, inverse_scale=None)) + quantizer.shift
    elif quantizer is not None:
        seen = rounded(rows, quantizer) + quantizer.shift
    weight = statistics.weight
    if change.codes is not None and change.scale is not None:
        weight = change.codes.double().reshape(shape) * change.scale.double().reshape(*shape[:2], 1)
    elif (new := change.float_weight()) is not None:
        weight = new.double().reshape(shape)
    elif change.factors:  # what is rounded between them is little beside what a rank loses
        weight = product(change.factors).reshape(shape)
        centre = change.factors[0].bias
        if centre is not None:
            last = product(change.factors[1:]).reshape(shape[1], -1)
            old = old - (last @ centre.double()).reshape(1, *shape[:2])
    moved = torch.einsum("tgn,gmn->tgm", seen, weight) - old
    if change.bias is not None:
        given = statistics.bias if statistics.bias is not None else 0.0
        moved = moved + (change.bias.double().reshape(shape[:2]) - given)
    return moved.square().mean(0).reshape(-1)


def width_proxy(
    candidate: Candidate, change: SiteChange, statistics: WidthStatistics, gradients: Gradients
) -> float | None:
    """What fewer units should cost: the loss of all readers, each taken to have an equal share."""
    loss = candidate.detail.get("loss")
    readers = [op for op in change.site.ops if op in gradients.by_op]
    if loss is None or not readers or len(readers) != len(statistics.consumers):
        return None
    felt = [
        consumer.scale * float(gradients.by_op[op].mean())
        for op, consumer in zip(readers, statistics.consumers, strict=True)
    ]
    return float(loss) * sum(felt) / len(felt)


def thinned(candidates: Sequence[Candidate], useless: float) -> dict[int, str]:
    """Position -> why a candidate is not worth more samples than the least, by its prediction.

    Either its output says nothing about the input any more, or another level of its site is no
    larger, is at least as fast by construction (the same format, or no more units) and errs less.

    Args:
        candidates: With predictions where there are any.
        useless: The error of an answer that does not look at the input.
    """
    reasons: dict[int, str] = {}
    for i, candidate in enumerate(candidates):
        if candidate.proxy is None:
            continue
        if candidate.proxy >= _HOPELESS * useless:
            reasons[i] = (
                f"predicted error {candidate.proxy:.2g}, of an answer that ignores the input "
                f"{useless:.2g}"
            )
            continue
        better = next((other for other in candidates if _dominates(other, candidate)), None)
        if better is not None:
            reasons[i] = f"predicted error {candidate.proxy:.2g}; {better.level} by {better.method}"
            reasons[i] += f" is no larger or slower, predicted {better.proxy:.2g}"
    return reasons


def _dominates(other: Candidate, candidate: Candidate) -> bool:
    if other is candidate or other.site != candidate.site:
        return False
    if other.proxy is None or candidate.proxy is None or other.size_bytes > candidate.size_bytes:
        return False
    units = isinstance(other.level, int) and isinstance(candidate.level, int)
    if not (other.level <= candidate.level if units else other.level == candidate.level):  # type: ignore[operator]
        return False
    return other.proxy * _DOMINATES <= candidate.proxy
