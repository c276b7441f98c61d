"""What a level of one site says about others."""

from collections.abc import Mapping

from tersor.core.records import Level

KEPT = 2  # the level of a branch that stays
Inside = Mapping[str, tuple[str, ...]]  # branch -> all sites that go with it


def gone_with(assignment: Mapping[str, Level], inside: Inside) -> frozenset[str]:
    """Sites that are inside of branches which are not kept; branches not listed are kept."""
    return frozenset(
        site
        for branch, sites in inside.items()
        if assignment.get(branch, KEPT) != KEPT
        for site in sites
    )


def settled(
    assignment: Mapping[str, Level], inside: Inside, native: Mapping[str, Level]
) -> dict[str, Level]:
    """An assignment in which what is gone with a branch is left alone: no choice is made for it.

    Args:
        assignment: Site -> level.
        inside: What goes with each branch.
        native: Site -> its level when left alone, of all sites inside.
    """
    gone = gone_with(assignment, inside)
    return {s: native.get(s, level) if s in gone else level for s, level in assignment.items()}
