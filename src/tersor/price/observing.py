"""Whole builds are made, profiled and measured; those that were measured before are found again.

The first of the builds, all native, is the reference of what is kept (``memory``): it is measured in
every session, and so is a second one, which shows whether the machine has changed in kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Executable
from tersor.price.baseline import Call
from tersor.price.memory import MOST_DRIFT, KeptBuild, PriceMemory, agrees, drift
from tersor.price.observation import Observation
from tersor.price.tools import PriceTools
from tersor.price.variants import Variant

REFERENCE, _AGAIN = "reference", "reference again"
_MOST_CHANGE = 0.1  # of the reference's time, as a logarithm, up to which one measurement is enough
_SAME = 0.05  # between two measurements of it that agree
_MOST_TRIES = 3


@dataclass(slots=True)
class _Kept:
    """The memory as far as these builds go.

    Attributes:
        keys: One a build; the first is that of the reference.
        reference_ms: Today's; 0 until it was measured.
    """

    memory: PriceMemory
    keys: list[str]
    reference_ms: float = 0.0
    waiting: dict[int, Observation] = field(default_factory=dict)

    def find(self) -> dict[int, KeptBuild]:
        """Builds of which something is kept."""
        found = {i: kept for i, key in enumerate(self.keys) if (kept := self.memory.build(key))}
        return {i: kept for i, kept in found.items() if kept.reference == self.keys[0]}

    def put(self, new: Mapping[int, Observation]) -> None:
        """Keep builds, as soon as the reference is known."""
        self.waiting |= new
        if 0 in new:
            self.reference_ms = new[0].measured_ms
        if self.reference_ms > 0:
            for i, observation in self.waiting.items():
                self.memory.keep_build(self.keys[i], self._record(observation))
            self.waiting = {}

    def _record(self, observation: Observation) -> KeptBuild:
        return KeptBuild(
            node_ms=observation.node_ms,
            measured_ms=observation.measured_ms,
            reference=self.keys[0],
            reference_ms=self.reference_ms,
        )


def observe_builds(
    choice: BuildChoice, variants: Sequence[Variant], tools: PriceTools, batch: int
) -> list[Observation]:
    """Build, profile and measure, ``batch`` builds at a time; what can't be built is left out.

    Batches are drawn by chance: what one of them is off by must look like no kind of build. With a
    memory, builds that were measured before are not measured again, but for two of them.

    Args:
        choice: How to build.
        variants: What; the first is the native build.
        tools: What is called.
        batch: Builds that are alive at once, besides the reference.
    """
    kept = None
    found: dict[int, Observation] = {}
    if tools.memory is not None and variants:
        keys = [tools.memory.key(choice, v.assignment) for v in variants]
        kept = _Kept(tools.memory, keys)
        found = _recalled(choice, variants, tools, kept)
    order = np.random.default_rng(len(variants)).permutation(len(variants))
    missing = [int(i) for i in order if int(i) not in found]
    batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    # The reference's first: from then on, what is measured is kept whatever happens.
    for places in sorted(batches, key=lambda places: 0 not in places):
        new = _observe(choice, {i: variants[i] for i in places}, tools)
        found |= new
        if kept is not None:
            kept.put(new)
    return [found[i] for i in sorted(found)]


def measure_interleaved(calls: Mapping[str, Call], tools: PriceTools) -> dict[str, float]:
    """Median latencies beside the reference, without its drift since it was chosen.

    Where the reference takes more than a tenth more or less than it did, all are measured again: a
    neighbour on the machine may have slowed it alone. Two measurements that agree on its speed, or the
    nearest of three, count.
    """
    tries: list[tuple[float, dict[str, float]]] = []
    while len(tries) < _MOST_TRIES:
        timings = tools.measure({REFERENCE: tools.reference, **calls, _AGAIN: tools.reference})
        # All depends on the reference: it runs at two places of each round.
        both = (timings[REFERENCE].median_ms + timings[_AGAIN].median_ms) / 2
        change = both / tools.reference_ms
        found = {name: timings[name].median_ms / change for name in calls}
        if _apart(change, 1.0) <= _MOST_CHANGE or any(_apart(change, c) <= _SAME for c, _ in tries):
            return found
        tries.append((change, found))
    return min(tries, key=lambda t: _apart(t[0], 1.0))[1]


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))


def measure_builds(
    choice: BuildChoice, variants: Mapping[int, Variant], tools: PriceTools
) -> dict[int, float]:
    """Latencies alone; what can't be built is left out."""
    builds = _built(choice, variants, tools)
    calls = {str(i): tools.caller(build) for i, build in builds.items()}
    times = measure_interleaved(calls, tools) if calls else {}
    return {i: times[str(i)] for i in builds}


def _recalled(
    choice: BuildChoice, variants: Sequence[Variant], tools: PriceTools, kept: _Kept
) -> dict[int, Observation]:
    """What is kept of builds, at today's speed; nothing where the machine has changed."""
    known = kept.find()
    others = [i for i in known if i > 0]
    if not others:
        return {}
    # The second is the all-int8 build, or what there is: as little like the reference as can be.
    measured = measure_builds(choice, {i: variants[i] for i in (0, others[0])}, tools)
    if len(measured) < 2:
        return {}
    kept.reference_ms = measured[0]
    now, second = measured[0], known[others[0]]
    if not agrees(second, measured[others[0]], now):
        tools.note(
            f"{choice.describe()}: {len(known)} kept builds are measured again: beside the native "
            f"build one of them takes {_change(second, measured[others[0]], now):+.0%} of what it did"
        )
        return {}
    factors = {i: drift(now, k.reference_ms) for i, k in known.items()}
    good = {i: factor for i, factor in factors.items() if factor is not None}
    if len(good) < len(known):
        tools.note(
            f"{choice.describe()}: {len(known) - len(good)} kept builds are measured again: the "
            f"native build has changed by more than {MOST_DRIFT:.0%} since"
        )
    if good:
        tools.note(
            f"{choice.describe()}: {len(good)} of {len(variants)} builds were measured before; the "
            f"native one takes {now:.2f} ms now"
        )
    return {
        i: Observation(
            assignment=variants[i].assignment,
            node_ms={name: ms * factor for name, ms in known[i].node_ms.items()},
            measured_ms=known[i].measured_ms * factor,
            held_out=variants[i].held_out,
        )
        for i, factor in good.items()
    }


def _change(kept: KeptBuild, measured_ms: float, reference_ms: float) -> float:
    return measured_ms / kept.measured_ms / (reference_ms / kept.reference_ms) - 1


def _built(
    choice: BuildChoice, variants: Mapping[int, Variant], tools: PriceTools
) -> dict[int, Executable]:
    builds: dict[int, Executable] = {}
    for i, variant in variants.items():
        try:
            builds[i] = tools.build(choice, variant.assignment)
        except BackendError as error:  # the others still make a table
            tools.note(f"{choice.describe()}: a build was dropped: {error}")
    return builds


def _observe(
    choice: BuildChoice, variants: Mapping[int, Variant], tools: PriceTools
) -> dict[int, Observation]:
    """Build a batch, profile and measure it; nothing of it outlives this call."""
    builds = _built(choice, variants, tools)
    if not builds:
        return {}
    profiles = {i: build.profile() for i, build in builds.items()}
    times = measure_interleaved({str(i): tools.caller(b) for i, b in builds.items()}, tools)
    return {
        i: Observation(
            assignment=variants[i].assignment,
            node_ms=_at_speed(profiles[i], times[str(i)]),
            measured_ms=times[str(i)],
            held_out=variants[i].held_out,
        )
        for i in builds
    }


def _at_speed(node_ms: Mapping[str, float], measured_ms: float) -> dict[str, float]:
    """Node times at the speed of the measurement, of which they are then the parts.

    A profile is of one moment and its counters take time themselves; the latency was measured
    beside the reference.
    """
    total = sum(node_ms.values())
    factor = measured_ms / total if total > 0 else 1.0
    return {name: ms * factor for name, ms in node_ms.items()}
