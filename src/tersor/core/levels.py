"""What a level of one site says about others."""

from collections.abc import Mapping

from tersor.core.records import Level

Inside = Mapping[str, tuple[str, ...]]  # branch -> all sites that go with it


def gone_with(assignment: Mapping[str, Level], inside: Inside, kept: int = 2) -> frozenset[str]:
    """Sites that are inside of branches which are not kept.

    Args:
        assignment: Site -> level; branches that it does not list are kept.
        inside: What goes with each branch.
        kept: The level of a branch that stays.
    """
    return frozenset(
        site
        for branch, sites in inside.items()
        if assignment.get(branch, kept) != kept
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
