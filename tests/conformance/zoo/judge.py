"""What the axes analysis finds in one model, and whether cutting is zeroing there."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.core.errors import TersorError
from tersor.graph.axes import Axes, analyse_axes, mac_share
from tersor.graph.axes.gate import GateReport, check_random
from tersor.graph.contracts import Graph
from tests.conformance.zoo.capturing import captured
from tests.conformance.zoo.entry import ZooModel

SHARE = 0.3  # of the units of every exact width at once
# Share of the MACs at ops that an exact width runs into or out of.
GOALS = {"cnn": 0.6, "transformer": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One model's row.

    Attributes:
        status: "ok"; "differs": cutting is not zeroing; "blind": zeroing moved nothing;
            "refused": an error that names op and way out; "error": any other.
        difference: Largest difference between cut and zeroed, of the output's scale.
        effect: How far zeroing moved the output, of its scale.
        batch: Samples in the comparison; the capture had another number.
        held_by: Ops that hold pinned dimensions -> how many.
        unknown: Ops without a rule that met a width -> how often.
        reached: Share of MACs at ops that an exact width of at least 2 units runs through.
    """

    name: str
    family: str
    source: str
    kind: str
    status: str
    error: str = ""
    difference: float | None = None
    effect: float | None = None
    batch: int = 0
    exact: int = 0
    approximate: int = 0
    pinned: int = 0
    silent: tuple[str, ...] = ()
    held_by: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    reached: float | None = None
    parameters: int = 0
    nodes: int = 0
    capture_seconds: float = 0.0
    analysis_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Cutting is zeroing, and the check could have failed."""
        return self.status == "ok"


def judge(entry: ZooModel, *, each: bool = False) -> Judged:
    """Capture, analyse, and remove a share of every exact width at another batch size.

    Args:
        entry: The model.
        each: Also zero every width alone, to name those that move nothing.
    """
    about: dict[str, Any] = {
        "name": entry.name,
        "family": entry.family,
        "source": entry.source,
        "kind": entry.kind,
    }
    start = time.perf_counter()
    try:
        graph = captured(entry).graph
        seconds = time.perf_counter() - start
        axes = analyse_axes(graph)
        report = _checked(graph, axes, each=each)
    except TersorError as error:
        return Judged(**about, status="refused", error=_first(error))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a row of the table
        return Judged(**about, status="error", error=f"{type(error).__name__}: {_first(error)}")
    return _row(about, graph, axes, report, seconds)


def _checked(graph: Graph, axes: Axes, *, each: bool) -> GateReport:
    """The comparison of exact widths; of all the others where there are none.

    Approximate widths pass it where norms keep the statistics of what they were made for.
    """
    exact = any(w.exactness == "exact" for w in axes.widths)
    return check_random(graph, axes, share=SHARE, each=each, exact_norms=not exact)


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _row(
    about: dict[str, Any], graph: Graph, axes: Axes, report: GateReport, seconds: float
) -> Judged:
    exactness = Counter(w.exactness for w in axes.widths)
    if report.passed:
        status = "ok"
    else:
        status = "differs" if report.difference > report.tolerance else "blind"
    return Judged(
        **about,
        status=status,
        difference=finite(report.difference),
        effect=finite(report.effect),
        batch=report.batch,
        exact=exactness["exact"],
        approximate=exactness["approximate"],
        pinned=len(axes.pinned),
        silent=report.silent,
        held_by=dict(Counter(p.op for p in axes.pinned).most_common()),
        unknown=dict(axes.unknown),
        reached=mac_share(graph, axes),
        parameters=sum(p.numel() for p in graph.module.parameters())
        + sum(b.numel() for b in graph.module.buffers()),
        nodes=len(graph.module.graph.nodes),
        capture_seconds=seconds,
        analysis_seconds=axes.seconds,
    )


def finite(value: float) -> float | None:
    """None where a comparison gave infinity, which JSON can't say."""
    return value if value < float("inf") else None


def summary(row: Judged) -> str:
    """One row as a line of text."""
    if row.difference is None and row.effect is None:
        return f"{row.name:46} {row.status:8} {row.error[:160]}"
    difference = "inf" if row.difference is None else f"{row.difference:.0e}"
    effect = "inf" if row.effect is None else f"{row.effect:.0e}"
    unknown = f"  no rule: {', '.join(row.unknown)}" if row.unknown else ""
    silent = f"  silent: {', '.join(row.silent[:4])}" if row.silent else ""
    return (
        f"{row.name:46} {row.status:8} {difference:>6} of {effect:>6}  "
        f"exact {row.exact:4} approx {row.approximate:3} pinned {row.pinned:4}  "
        f"MACs {100 * (row.reached or 0):5.1f} %  {row.analysis_seconds:5.1f} s{unknown}{silent}"
    )
