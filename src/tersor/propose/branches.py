"""What a residual branch costs in quality: one real forward without it, or with a linear map."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind, Site
from tersor.graph.branches import KEPT, MAPPED, REMOVED, BranchStatistics, replace_branches
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.geometry import output_error
from tersor.ops.linear_map import DAMPING, linear_map
from tersor.propose.propose import with_error

Proposal = tuple[Candidate, SiteChange]


def branch_changes(
    site: Site, statistics: BranchStatistics, *, damping: float = DAMPING
) -> list[Proposal]:
    """The levels of a branch: kept, the best linear map where one is offered, removed.

    Args:
        site: A branch.
        statistics: Of it.
        damping: Of the map's fit, relative to the mean diagonal of its inputs' covariance.

    Raises:
        NumericalError: The statistics are not finite.
    """
    changes = [SiteChange(site=site, level=KEPT)]
    if statistics.moments is not None:
        found = linear_map(statistics.moments, damping)
        changes.append(
            SiteChange(
                site=site,
                level=MAPPED,
                weight=found.weight.flatten(0, 1),
                bias=found.bias.flatten(),
                report={"loss": found.loss, "damping": found.damping},
            )
        )
    changes.append(SiteChange(site=site, level=REMOVED, bias=statistics.mean))
    return [(_candidate(change), change) for change in changes]


def _candidate(change: SiteChange) -> Candidate:
    method = {KEPT: "native", MAPPED: "linear map", REMOVED: "mean"}[int(change.level)]
    return Candidate(
        site=change.site.name,
        level=change.level,
        method=method,
        size_bytes=change.site.size_bytes,
        detail=dict(change.report),
    )


def measure_branches(
    graph: Graph,
    sites: Sequence[Site],
    statistics: Mapping[str, BranchStatistics],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    kind: OutputKind,
    advance: Callable[[], None] = lambda: None,
) -> list[Proposal]:
    """All candidates with the error that each causes alone, its standard error and its bytes.

    Args:
        graph: The original.
        sites: Branches of it; pinned ones are left out.
        statistics: By site name.
        batches: Flat inputs of the search part.
        kind: The output's geometry.
        advance: Called once for each candidate.
    """
    wanted = [graph.run(flat) for flat in batches]
    found: list[Proposal] = []
    for site in sites:
        if site.pinned is not None:
            continue
        for candidate, change in branch_changes(site, statistics[site.name]):
            advance()
            if change.level == KEPT:
                found.append((candidate, change))
                continue
            edited = replace_branches(graph, [change])
            errors = torch.cat(
                [output_error(edited.run(f), w, kind) for f, w in zip(batches, wanted, strict=True)]
            )
            measured = replace(
                with_error(candidate, errors),
                size_bytes=site.size_bytes + edited.parameter_bytes() - graph.parameter_bytes(),
            )
            found.append((measured, change))
    return found
