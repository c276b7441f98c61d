"""A profile beside what the device can do at most: which op is bound by what.

The ceilings are measured (``api.profiling``), in the formats and with the threads of the build. An op's
floor is the longer of its MACs at the device's rate and its bytes at the device's bandwidth (the roofline
of Williams et al. 2009); floor over time says how far it is from what any kernel could do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tersor.core.records import OUTSIDE, Format, Timing
from tersor.graph.facts import NodeFacts

Bound = Literal["compute", "memory", "overhead", ""]

# An op whose floor is below this part of its time is bound by neither: calls, layouts, waiting.
LEAST_SHARE = 0.1
LONG_MS = 0.005  # of an op whose rate counts: counters are cut to whole microseconds
_BYTES: Mapping[str, int] = {"int8": 1, "bf16": 2, "fp16": 2}  # an element; f32 and others: 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this device does at most with the build's threads, as measured.

    Attributes:
        macs_per_s: Format -> multiply-accumulates a second, the most of a large product, of a
            convolution, and of any long op of the build.
        bytes_per_s: Read and written a second in a large copy; None where it was not measured.
    """

    macs_per_s: Mapping[str, float]
    bytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One source op, or a kind of glue that comes from none.

    Attributes:
        layer: The layer that the op belongs to, else the op's name.
        kind: linear, conv, norm ...; "glue" for what is no op of the graph.
        ms: A warm call spends in it.
        share: Of the sum of all rows.
        macs: Multiply-accumulates.
        bytes: That it has to read and write, weights included.
        bound: By what its floor is set; "" where nothing is known.
        of_ceiling: Floor over time; None where nothing is known.
    """

    node: str
    layer: str
    kind: str
    format: str
    ms: float
    share: float
    macs: int = 0
    bytes: int = 0
    bound: Bound = ""
    of_ceiling: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where a build spends its time, and what bounds it.

    Attributes:
        name: Of the model or file.
        build: How it was built.
        call: One call, measured without counters.
        rows: In the order of the graph; glue last. Their times are scaled to add up to the call.
        outside_ms: Of a call, outside of all ops: launches and gaps.
        floor_ms: What all ops would take at their ceilings; None without ceilings.
        weight_bytes: Of the stored model.
        peak_bytes: Extra memory of one call at its peak; None where the system does not tell.
    """

    name: str
    build: str
    call: Timing
    rows: tuple[ProfileRow, ...]
    outside_ms: float
    floor_ms: float | None
    ceilings: Ceilings | None
    weight_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """What a profile's nodes are.

    Attributes:
        facts: Their sizes, in graph order.
        formats: Of layers; all other nodes have the precision.
        layers: Node -> the name of its layer.
        precision: Of the build.
    """

    facts: Mapping[str, NodeFacts]
    formats: Mapping[str, Format]
    layers: Mapping[str, str]
    precision: Format


def profile_rows(
    times_ms: Mapping[str, float], call_ms: float, nodes: Nodes, ceilings: Ceilings | None
) -> tuple[ProfileRow, ...]:
    """Rows of a profile, ``OUTSIDE`` left out.

    Args:
        times_ms: As ``Executable.profile`` gives them.
        call_ms: What they are scaled to, ``OUTSIDE`` included: counters take time themselves.
        nodes: Of the graph.
        ceilings: Of the device.
    """
    facts, precision = nodes.facts, nodes.precision
    total = sum(times_ms.values())
    scale = call_ms / total if total > 0 else 0.0
    spent = {n: ms * scale for n, ms in times_ms.items() if n != OUTSIDE}
    whole = sum(spent.values()) or 1.0
    found: list[ProfileRow] = []
    for node in (n for n in facts if n in spent):
        level = nodes.formats.get(node, precision)
        own = facts[node]
        size = _bytes(own, level, precision)
        bound, share = _bound(own.macs, size, level, spent[node], ceilings)
        found.append(
            ProfileRow(
                node=node,
                layer=nodes.layers.get(node, node),
                kind=own.kind,
                format=level,
                ms=spent[node],
                share=spent[node] / whole,
                macs=own.macs,
                bytes=size,
                bound=bound,
                of_ceiling=share,
            )
        )
    rest = sorted((n for n in spent if n not in facts), key=lambda n: -spent[n])
    return (
        *found,
        *(
            ProfileRow(node=n, layer=n, kind="glue", format="", ms=spent[n], share=spent[n] / whole)
            for n in rest
        ),
    )


def raised(ceilings: Ceilings, rows: tuple[ProfileRow, ...]) -> Ceilings:
    """Ceilings that are no lower than what an op of the build has reached.

    Some kernel may suit an op of the build better than any product of the probe; ops that are too
    short to be timed well do not count.
    """
    rates = dict(ceilings.macs_per_s)
    for row in rows:
        if row.ms >= LONG_MS and row.macs and row.format in rates:
            rates[row.format] = max(rates[row.format], row.macs / row.ms * 1e3)
    return replace(ceilings, macs_per_s=rates)


def floor_ms(rows: tuple[ProfileRow, ...]) -> float:
    """What the rows would take at their ceilings; glue costs nothing there."""
    return sum(row.ms * min(1.0, row.of_ceiling) for row in rows if row.of_ceiling is not None)


def _bytes(facts: NodeFacts, level: Format, precision: Format) -> int:
    own, plain = _BYTES.get(level, 4), _BYTES.get(precision, 4)
    return facts.weight_elements * own + facts.in_elements * own + facts.out_elements * plain


def _bound(
    macs: int, size: int, level: Format, ms: float, ceilings: Ceilings | None
) -> tuple[Bound, float | None]:
    if ceilings is None or ms <= 0:
        return "", None
    rate = ceilings.macs_per_s.get(level)
    compute = macs / rate * 1e3 if rate else 0.0
    memory = size / ceilings.bytes_per_s * 1e3 if ceilings.bytes_per_s else 0.0
    floor = max(compute, memory)
    if floor < LEAST_SHARE * ms:
        return "overhead", floor / ms
    return ("compute" if compute >= memory else "memory"), floor / ms
