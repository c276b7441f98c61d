"""One row for each build of a comparison, as a record and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.core.records import OutputKind, Timing
from tersor.core.units import format_bytes
from tersor.report.terminal import timing
from tersor.timing.protocol import Ratio

Kind = Literal["eager", "uncompressed", "peer", "ours"]
AGREEMENT_NAMES: dict[OutputKind, str] = {
    "embedding": "mean cosine",
    "logits": "equal top-1",
    "values": "agreement",
}
_NONE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One build of one case; every figure from the same run.

    Attributes:
        case: The model's short name.
        name, kind: Which build.
        build: How it runs: backend, precision, threads.
        latency: One call at ``batch``, all rows interleaved.
        speedup: Against the best uncompressed build, with 95 % bounds.
        versus_peer: Of our row: against the fastest peer.
        size_bytes: The parameters of the model as given; else the files.
        output: What ``agreement`` means.
        agreement, agreement_p5: With the model as given on the test part: mean, and 5th percentile
            over the samples where a sample's agreement is no mere yes or no.
        score: The case's metric on the test part.
        missed: Ours, and it is the best uncompressed build: no compressed one was better.
        note: What the reader must know beside the figures.
    """

    case: str
    name: str
    kind: Kind
    build: str
    batch: int
    latency: Timing
    speedup: Ratio
    versus_peer: Ratio | None = None
    size_bytes: int
    output: OutputKind
    test_samples: int
    agreement: float
    agreement_p5: float | None = None
    score: float | None = None
    missed: bool = False
    note: str = ""


def comparison_table(title: str, rows: Sequence[Row]) -> RenderableType:
    """The rows of one case, and in a line below how ours stands against the fastest peer."""
    first = rows[0]
    scored = any(row.score is not None for row in rows)
    table = Table(
        title=Text(f"{title}; batch {first.batch}, {first.test_samples} test samples"),
        title_justify="left",
        header_style="bold",
    )
    table.add_column("build")
    for name in _columns(first.output, scored):
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_column("note", overflow="fold")
    for row in rows:
        style = "bold" if row.kind == "ours" else ""
        table.add_row(*(Text(cell) for cell in _cells(row, scored)), style=style)
    return Group(table, Text(summary(rows)))


def summary(rows: Sequence[Row]) -> str:
    """Ours against the fastest peer in one sentence; empty without either."""
    ours = next((row for row in rows if row.kind == "ours"), None)
    peer = fastest_peer(rows)
    if ours is None or peer is None or ours.versus_peer is None:
        return ""
    speed, name = ours.versus_peer, AGREEMENT_NAMES[ours.output]
    return (
        f"{ours.case}: ours runs at {_speed(speed)} the speed of {peer.name}, the fastest peer; "
        f"{name} {ours.agreement:.5f} against {peer.agreement:.5f}"
        f"{'; MISSED: ours is the best uncompressed build' if ours.missed else ''}"
    )


def fastest_peer(rows: Sequence[Row]) -> Row | None:
    """The peer with the least median latency."""
    peers = [row for row in rows if row.kind == "peer"]
    return min(peers, key=lambda row: row.latency.median_ms, default=None)


def _columns(output: OutputKind, scored: bool) -> list[str]:
    columns = ["latency ms, median [95 %]", "speed vs best uncompressed", "size"]
    columns.append(AGREEMENT_NAMES[output])
    if output != "logits":
        columns.append("5th percentile")
    return [*columns, "accuracy"] if scored else columns


def _cells(row: Row, scored: bool) -> list[str]:
    cells = [
        f"{row.name} ({row.build})",
        timing(row.latency),
        _speed(row.speedup),
        format_bytes(float(row.size_bytes)),
        f"{row.agreement:.5f}",
    ]
    if row.output != "logits":
        cells.append(_NONE if row.agreement_p5 is None else f"{row.agreement_p5:.5f}")
    if scored:
        cells.append(_NONE if row.score is None else f"{100 * row.score:.2f} %")
    return [*cells, f"missed; {row.note}".rstrip("; ") if row.missed else row.note]


def _speed(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
