"""Every method's candidates at every site, each with the error that it causes alone.

The error is one real forward pass with only that site replaced: what stands before the site is
taken from one pass of the original, so that a change costs only what follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import (
    Graph,
    Method,
    SiteChange,
    SiteStatistics,
    WidthStatistics,
    works_on,
)
from tersor.graph.edit import run_all, run_changed
from tersor.graph.geometry import output_error

_ACTIVATION_BYTES = 1 << 29  # of all intermediate results of one chunk of samples
NATIVE = ("f32", "bf16")  # levels that no edit of the graph expresses
# Rounding weights alone to 8 bits changes the output so little that a few samples rank it.
_SAMPLES_OF_STORAGE = 16


@dataclass(frozen=True, slots=True)
class Offer:
    """A candidate and the change that puts it into effect on the original model."""

    candidate: Candidate
    change: SiteChange


def offers(
    sites: Sequence[Site],
    statistics: Mapping[str, SiteStatistics | WidthStatistics],
    methods: Mapping[str, Method],
    allowed: Callable[[Candidate], bool],
    advance: Callable[[], None] = lambda: None,
) -> list[Offer]:
    """Candidates of all sites that are not pinned, with their changes; no errors yet."""
    found: list[Offer] = []
    for site in sites:
        if site.pinned is None:
            for name, method in methods.items():
                if not works_on(method, site):
                    continue
                for candidate in method.propose(site, statistics[site.name]):
                    named = replace(candidate, method=name)
                    if allowed(named):
                        change = method.apply(site, named, statistics[site.name])
                        found.append(Offer(named, change))
        advance()
    return found


def measure_errors(
    graph: Graph,
    proposals: Sequence[Offer],
    flat: tuple[Tensor, ...],
    kind: OutputKind,
    advance: Callable[[], None] = lambda: None,
    others: Sequence[tuple[Tensor, ...]] = (),
) -> list[Candidate]:
    """The candidates with mean error and its standard error over the samples.

    Args:
        graph: The original.
        proposals: As ``offers`` gives them.
        flat: Flat inputs of the search samples.
        kind: The output's geometry.
        advance: Called once for each proposal and chunk.
        others: Flat inputs of the samples of each other shape.
    """
    edited = {
        i: apply(graph, [offer.change])
        for i, offer in enumerate(proposals)
        if offer.candidate.level not in NATIVE
    }
    before = {node.name for node in graph.module.graph.nodes}
    output = next(node.name for node in graph.module.graph.nodes if node.op == "output")
    errors: dict[int, list[Tensor]] = {i: [] for i in edited}
    seen = 0
    for chunk in chunks(graph, flat, others):
        env = run_all(graph.module, chunk)
        wanted = env[output]
        for i, variant in edited.items():
            if proposals[i].candidate.level == "int8_weight" and seen >= _SAMPLES_OF_STORAGE:
                advance()
                continue
            touched = set(proposals[i].change.site.ops)
            found = run_changed(
                variant.module,
                env,
                lambda node, t=touched: node.name in t or node.name not in before,  # type: ignore[misc]
            )
            errors[i].append(output_error(found, wanted, kind))
            advance()
        seen += chunk[0].shape[0]
    return [
        with_error(offer.candidate, torch.cat(errors[i])) if i in errors else offer.candidate
        for i, offer in enumerate(proposals)
    ]


def chunk_count(
    graph: Graph, flat: tuple[Tensor, ...], others: Sequence[tuple[Tensor, ...]] = ()
) -> int:
    """How many chunks ``measure_errors`` runs."""
    return len(chunks(graph, flat, others))


def chunks(
    graph: Graph, flat: tuple[Tensor, ...], others: Sequence[tuple[Tensor, ...]] = ()
) -> list[tuple[Tensor, ...]]:
    """The samples in chunks of one shape whose intermediate results fit in memory."""
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
    return max(1, min(_SAMPLES_OF_STORAGE, int(_ACTIVATION_BYTES / max(per_sample, 1.0))))


def with_error(candidate: Candidate, errors: Tensor) -> Candidate:
    """A candidate with the mean of its errors over samples [t] and that mean's standard error."""
    deviation = float(errors.std()) if len(errors) > 1 else 0.0
    return replace(
        candidate,
        error=float(errors.mean()),
        error_se=deviation / max(1, len(errors)) ** 0.5,
    )
