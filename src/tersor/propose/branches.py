"""What a residual branch costs in quality: one real forward without it, or with a linear map."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from tersor.core.levels import KEPT
from tersor.core.records import Candidate, OutputKind
from tersor.graph.branches import replace_branches
from tersor.graph.contracts import Graph, SiteChange
from tersor.observe.ranks import ALONE, RankGroup
from tersor.propose.errors import sampled_errors, with_errors
from tersor.propose.sampling import Precision

Proposal = tuple[Candidate, SiteChange]


def measure_branches(  # noqa: PLR0913 - the stage's inputs
    graph: Graph,
    proposals: Sequence[Proposal],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    kind: OutputKind,
    precision: Precision | None = None,
    advance: Callable[[], None] = lambda: None,
    ranks: RankGroup = ALONE,
) -> list[Candidate]:
    """The candidates with the error that each causes alone, its standard error and its bytes.

    Args:
        graph: The original.
        proposals: Candidates of branches with their changes.
        batches: Flat inputs of the search part.
        kind: The output's geometry.
        precision: When an error is known well enough.
        advance: Called once for each candidate.
        ranks: Who measures candidates of its own at the same time.
    """
    edited = {
        i: replace_branches(graph, [change])
        for i, (_, change) in enumerate(proposals)
        if change.level != KEPT
    }
    errors: Mapping[int, Tensor] = {}
    if edited or ranks.is_shared:
        errors = sampled_errors(
            graph,
            edited,
            batches,
            kind,
            sites={i: proposals[i][0].site for i in edited},
            precision=precision or Precision(),
            advance=advance,
            ranks=ranks,
        )
    found: list[Candidate] = []
    for i, (candidate, change) in enumerate(proposals):
        if i not in edited:
            advance()
        else:
            saved = graph.parameter_bytes() - edited[i].parameter_bytes()
            candidate = replace(  # noqa: PLW2901 - with what was measured
                with_errors(candidate, errors[i]),
                size_bytes=change.site.size_bytes - saved,
                detail=dict(change.report),
            )
        found.append(candidate)
    return found
