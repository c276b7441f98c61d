"""What a residual branch costs in quality: one real forward without it, or with a linear map."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.branches import KEPT, replace_branches
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.geometry import output_error
from tersor.propose.propose import with_error

Proposal = tuple[Candidate, SiteChange]


def measure_branches(
    graph: Graph,
    proposals: Sequence[Proposal],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    kind: OutputKind,
    advance: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """The candidates with the error that each causes alone, its standard error and its bytes.

    Args:
        graph: The original.
        proposals: Candidates of branches with their changes.
        batches: Flat inputs of the search part.
        kind: The output's geometry.
        advance: Called once for each candidate.
    """
    wanted = [graph.run(flat) for flat in batches]
    found: list[Candidate] = []
    for candidate, change in proposals:
        advance()
        if change.level == KEPT:
            found.append(candidate)
            continue
        edited = replace_branches(graph, [change])
        errors = torch.cat(
            [output_error(edited.run(f), w, kind) for f, w in zip(batches, wanted, strict=True)]
        )
        found.append(
            replace(
                with_error(candidate, errors),
                size_bytes=change.site.size_bytes
                + edited.parameter_bytes()
                - graph.parameter_bytes(),
                detail=dict(change.report),
            )
        )
    return found
