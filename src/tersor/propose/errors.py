"""Errors of edited graphs by real forwards: what an edit does not change is the original's."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.contracts import Graph
from tersor.graph.edit import run_all
from tersor.graph.geometry import constant_error, output_error, output_spreads
from tersor.graph.suffix import Original, Suffix
from tersor.propose.sampling import Flat, Precision, mean_error, plan_scale, rounds

_ACTIVATION_BYTES = 1 << 29  # of all intermediate results of one chunk of samples
_MOST_SAMPLES = 16  # in a chunk
_EDIT_BYTES = 1 << 28  # of the tensors of all edits that are at hand at a time


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
) -> dict[int, Tensor]:
    """Output errors of each edited graph, over as many samples as it takes to know their mean.

    Args:
        graph: The original.
        variants: Edits of it, where nodes that stay keep their names; asked for anew in each round.
        batches: Flat inputs of all samples.
        kind: The output's geometry.
        sites: Variant -> the site that it changes.
        precision: When a mean is known well enough. None: all samples are read.
        few: Variants that are not worth more samples than the least.
        advance: Called once for each variant, when it is done.

    Returns:
        Variant -> errors, one a sample [t], of the same samples in the same order.
    """
    original = Original(graph)
    rule = precision or Precision(most=max(2, _count(batches)), least=max(2, _count(batches)))
    found: dict[int, list[Tensor]] = {i: [] for i in variants}
    active = list(variants)
    spreads: tuple[float, ...] | None = None
    useless = 0.0
    for chunks, is_last in rounds(batches, rule, chunk_size(graph)):
        if spreads is None:  # of the first round, for all: errors must not depend on the chunk
            outputs = [graph.run(tuple(t.clone() for t in flat)) for flat in chunks]
            spreads, useless = output_spreads(outputs), constant_error(outputs, kind)
        for suffixes in _at_hand(original, variants, active):
            wanted = {name for suffix in suffixes.values() for name in suffix.reads}
            for flat in chunks:
                before = original.values(flat, wanted)
                for i, suffix in suffixes.items():
                    new, old = suffix.run(flat, before), before[original.output]
                    found[i].append(output_error(new, old, kind, spreads))
        means = {i: mean_error(torch.cat(rows))[0] for i, rows in found.items()}
        scale = plan_scale(means, sites)
        done = {
            i for i in active
            if is_last or i in few or rule.is_enough(torch.cat(found[i]), scale, useless)
        }  # fmt: skip
        for _ in done:
            advance()
        active = [i for i in active if i not in done]
        if not active:
            break
    return {i: torch.cat(rows) for i, rows in found.items()}


def _at_hand(
    original: Original, variants: Mapping[int, Graph], wanted: Iterable[int]
) -> Iterator[dict[int, Suffix]]:
    """What the edits change, as many at a time as fit in memory."""
    found: dict[int, Suffix] = {}
    size = 0
    for i in wanted:
        found[i] = original.suffix(variants[i])
        size += found[i].own_bytes
        if size > _EDIT_BYTES:
            yield found
            found, size = {}, 0
    if found:
        yield found


def _count(batches: Sequence[Flat]) -> int:
    return sum(len(flat[0]) for flat in batches)


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
