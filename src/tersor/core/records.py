"""The records that the stages hand to each other: frozen, JSON-valued, without tensors.

A *site* is one choice; a *candidate* is one level of a site with its size and its error; a
*price* says what an op costs in context; a *plan* picks one level a site; a *verdict* says what
was measured. Times are milliseconds, sizes bytes, unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersor.core.errors import ConfigError

Format = Literal["f32", "bf16", "int8", "int8_weight"]
Precision = Literal["f32", "bf16"]
OutputKind = Literal["logits", "embedding", "values"]
Status = Literal["pass", "fail", "unknown"]
StructureKind = Literal["tensor", "tuple", "list", "dict", "object", "none", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output tensor; a size of None is the batch, which may be any."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """How tensors nest: a leaf, or a container with children (and keys where it has names)."""

    kind: StructureKind
    keys: tuple[str, ...] = ()
    children: tuple["Structure", ...] = ()
    type_name: str = ""
    value: str | int | float | bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The model's calling convention: flat tensors in order, and how callers nest them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    args: Structure
    kwargs: Structure
    result: Structure
    parameter_names: tuple[str, ...] = ()  # of forward(), in order


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildChoice:
    """What a backend may decide for a whole build."""

    backend: str
    device: str = "cpu"
    precision: Precision = "f32"
    threads: int = 1
    batch: int = 1
    options: Mapping[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads: found {self.threads}, wanted at least 1")
        if self.batch < 1:
            raise ConfigError(f"batch: found {self.batch}, wanted at least 1")

    def describe(self) -> str:
        """One short line for a table."""
        extra = "".join(f" {k}={v}" for k, v in sorted(self.options.items()))
        return f"{self.backend} {self.precision}, {self.threads} thread(s){extra}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatInfo:
    """A number format that a backend runs; weight codes lie in [-weight_limit, weight_limit]."""

    name: Format
    weight_limit: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a backend is and can do on this machine."""

    name: str
    available: bool
    version: str = ""
    device: str = "cpu"
    reason: str = ""  # why it is not available
    remedy: str = ""  # what to do about it
    precisions: tuple[Precision, ...] = ()
    formats: tuple[FormatInfo, ...] = ()
    choices: tuple[Mapping[str, str | int | bool], ...] = ()  # option sets worth measuring

    def format(self, name: Format) -> FormatInfo | None:
        """The format of that name, or None where the backend has none."""
        return next((f for f in self.formats if f.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Whether a backend runs a candidate, and if not, why."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One choice. Kind ``format``: the number format of the ops that use one weight."""

    name: str  # module path of the first op, as the user knows it
    kind: Literal["format"]
    ops: tuple[str, ...]  # graph nodes, in graph order
    op_kind: Literal["linear", "conv", "embedding"]
    weight: str  # the parameter's name
    shape: tuple[int, ...]  # of the weight
    groups: int = 1
    tensor: str | None = None  # the graph node that the ops read; its readers share a quantiser
    macs: int = 0  # per sample
    size_bytes: int = 0  # of weight and bias as given
    pinned: str | None = None  # why it stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One level of a site: the bytes it takes and the error it causes alone."""

    site: str
    level: Format
    method: str
    size_bytes: int
    error: float = 0.0  # change of the output in its own geometry, mean over samples
    error_se: float = 0.0  # standard error of that mean
    detail: Mapping[str, Any] = field(default_factory=dict)  # the method's own settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency of one callable: median of all runs, and a 95 % interval of that median."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds_ms: tuple[float, ...]  # median of each round, in order: the interleaved comparison
    runs: int
    dropped: int = 0  # runs during which the process was preempted


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedBuild:
    """One whole build that was measured to make or to test a table."""

    assignment: Mapping[str, Format]
    measured_ms: float
    predicted_ms: float
    held_out: bool  # no fit saw it


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """What a plan costs on one build choice: sum of the entries, times ``scale``."""

    choice: BuildChoice
    ops: Mapping[str, Mapping[str, float]]  # site -> format -> ms
    quantizers: Mapping[str, float]  # tensor -> ms, paid once if any reader is int8
    glue_ms: float
    scale: float = 1.0
    builds: tuple[PricedBuild, ...] = ()
    corrections: int = 0  # how often measured finalists moved the scale

    def predict_ms(self, assignment: Mapping[str, Format], tensors: Mapping[str, str]) -> float:
        """Predicted latency; ``tensors`` names the tensor that each site reads."""
        native = self.choice.precision
        total = self.glue_ms
        quantized = set()
        for site, row in self.ops.items():
            level = assignment.get(site, native)
            total += row.get(level, row.get(native, 0.0))
            if level == "int8" and site in tensors:
                quantized.add(tensors[site])
        total += sum(self.quantizers.get(t, 0.0) for t in sorted(quantized))
        return total * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRow:
    """One uncompressed build, measured beside the others."""

    name: str
    choice: BuildChoice | None  # None: the model as given, eager
    timing: Timing
    size_bytes: int
    agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The uncompressed builds and a table for each build choice that stays in the race."""

    machine: str  # fingerprint
    baselines: tuple[BaselineRow, ...]
    best: int  # index into baselines: the reference of every speed
    tables: tuple[PriceTable, ...]
    seconds: float = 0.0

    @property
    def baseline(self) -> BaselineRow:
        """The best uncompressed build."""
        return self.baselines[self.best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One level a site, on one build choice; readable, editable and replayable."""

    assignment: Mapping[str, Format]  # sites that are not listed stay in the choice's precision
    choice: BuildChoice
    predicted_ms: float
    predicted_bytes: int
    predicted_error: float
    target: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # site -> detail
    binding: str = ""  # the constraint that stopped it
    seed: int = 0
    model: str = ""  # content hash of the captured graph
    measured_ms: float | None = None
    measured_error: float | None = None

    def save(self, path: str | Path) -> None:
        """Write the plan as indented JSON, whole or not at all."""
        from tersor.core.jsonable import dumps
        from tersor.core.store import write_atomic

        write_atomic(path, dumps(self, indent=2).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One plan on the curve."""

    latency_ms: float
    size_mb: float
    drop: float  # points of the metric, or of agreement
    error: float
    measured: bool
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a verdict."""

    name: str
    wanted: float
    found: float
    status: Status
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was measured on the test part, against what was asked."""

    status: Status
    checks: tuple[Check, ...]
    latency: Timing
    baseline_latency: Timing
    original_latency: Timing | None
    speedup: float  # best uncompressed build over result, ratio of medians
    speedup_low: float  # 95 % bounds of that ratio
    speedup_high: float
    size_bytes: int
    original_bytes: int
    peak_bytes: int | None
    drop_points: float | None
    metric_original: float | None
    metric_result: float | None
    agreement: float
    agreement_p5: float  # 5th percentile over test samples
    output_kind: OutputKind
    test_samples: int
    held_out: bool
    test_uses: int
    binding: str = ""  # the constraint that stopped it, by name
    returned_baseline: bool = False
    reason: str = ""  # why the baseline was returned
    largest_difference: float = 0.0  # built against graph, of the output's scale
    notes: tuple[str, ...] = ()
