"""Which format of 8 bits a model's layers are offered in, where the device computes in two."""

import math
from collections.abc import Mapping, Sequence

from tersor.core.rank_levels import EIGHT_BITS
from tersor.core.records import Candidate, Level


def in_one_format(
    candidates: Sequence[Candidate], plan: Mapping[str, Level]
) -> tuple[Candidate, ...]:
    """The candidates without one of int8 and fp8 at the layers that are offered both.

    Layers that read one tensor share its quantiser, and prices know 8 bits and floats: so all of these layers
    get the format in which they err less together. Of equal errors it is fp8, whose products were the
    faster ones (docs/gpu.md). An error that is not finite counts as infinite. What a ``plan`` (site -> level) that is
    to be carried out has, stays.
    """
    offered: dict[str, set[object]] = {}
    for candidate in candidates:
        offered.setdefault(candidate.site, set()).add(candidate.level)
    both = {site for site, levels in offered.items() if levels >= {*EIGHT_BITS}}
    totals: dict[Level, float] = dict.fromkeys(reversed(EIGHT_BITS), 0.0)
    for candidate in candidates:
        if candidate.site in both and candidate.level in EIGHT_BITS:
            error = candidate.error if math.isfinite(candidate.error) else math.inf
            totals[candidate.level] += error
    kept = min(totals, key=lambda level: totals[level])

    def stays(candidate: Candidate) -> bool:
        if candidate.site not in both or candidate.level not in EIGHT_BITS:
            return True
        asked = plan.get(candidate.site)
        return candidate.level == (asked if asked in EIGHT_BITS else kept)

    return tuple(c for c in candidates if stays(c))
