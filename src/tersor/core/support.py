"""Whether a backend that describes itself runs a candidate."""

from tersor.core.formats import PACKED
from tersor.core.records import BackendInfo, Candidate, Support


def support_of(info: BackendInfo, candidate: Candidate) -> Support:
    """Yes for any count of a width, packed weights and the described formats; else no, with the reason.

    A backend gets a packed weight as the floats that it stands for; the artifact holds the bits.
    """
    if not info.available:
        return Support(ok=False, reason=f"{info.reason}; {info.remedy}")
    if isinstance(candidate.level, int):  # a width: any count is a shape like another
        return Support(ok=True)
    if candidate.level in PACKED:
        return Support(ok=True)
    if info.format(candidate.level) is None:
        known = ", ".join(f.name for f in info.formats)
        reason = f"{info.name} on this device has no {candidate.level}, only {known}"
        return Support(ok=False, reason=reason)
    return Support(ok=True)
