"""Whether a backend that describes itself runs a candidate."""

from tersor.core.formats import ACTIVATIONS, PACKED
from tersor.core.rank_levels import format_of
from tersor.core.records import BackendInfo, Candidate, Support


def support_of(info: BackendInfo, candidate: Candidate) -> Support:
    """Yes for counts of widths, packed weights, and any rank in the described formats; else why not.

    A backend gets a packed weight as the floats that it stands for; the artifact holds the bits.
    """
    if not info.available:
        return Support(ok=False, reason=f"{info.reason}; {info.remedy}")
    if isinstance(candidate.level, int):  # a width: any count is a shape like another
        return Support(ok=True)
    if candidate.level in PACKED or candidate.level in ACTIVATIONS:  # ops that every backend has
        return Support(ok=True)
    wanted = format_of(candidate.level)  # a rank is a shape like another
    if all(f.name != wanted for f in info.formats):
        known = ", ".join(f.name for f in info.formats)
        reason = f"{info.name} on this device has no {wanted}, only {known}"
        return Support(ok=False, reason=reason)
    return Support(ok=True)
