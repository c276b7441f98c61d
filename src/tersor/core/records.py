"""The records that the stages hand to each other: frozen, JSON-valued, without tensors.

A *site* is one choice; a *candidate* is one level of a site with its size and its error; a
*price* says what an op costs in context; a *plan* picks one level a site; a *verdict* says what
was measured. Times are milliseconds, sizes bytes, unless a name says otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersor.core import formats
from tersor.core.errors import ConfigError
from tersor.core.formats import priced_as
from tersor.core.rank_levels import is_eight_bit

Format = formats.Format
Level = formats.Level
Precision = Literal["f32", "bf16"]
# open: one build for all sizes; exact: frequent sizes have builds of their own; padded: some sizes
# have builds, to which smaller ones are padded. What has none goes to the open build.
ShapeMode = Literal["open", "exact", "padded"]
SiteKind = Literal["format", "width", "branch"]
ACTIVATION_PREFIX = "act:"  # of the names of sites that are activations
ADD_PREFIX = "add:"  # of the names of sites that are additions of two activations
WIDTH_PREFIX = "width:"  # of the names of width sites: layers and widths share one name space
WidthKind = Literal[
    "channels", "neurons", "heads", "head_dim", "groups", "stream", "experts", "features"
]
# exact: every op that meets the width commutes with deleting units; approximate: a statistic over
# the width changes with it.
Exactness = Literal["exact", "approximate"]
OutputKind = Literal["logits", "embedding", "values"]
Status = Literal["pass", "fail", "unknown"]
StructureKind = Literal["tensor", "tuple", "list", "dict", "object", "none", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output tensor, as the caller sees it.

    Attributes:
        shape: None is the batch, which may be any. A dimension with a symbol has the size of the
            graph's example, at which a build is made.
        dynamic: The symbol of each dimension beyond the batch that may have other sizes, "" for
            the others: one name is one size in all tensors of a call, an output's may be an
            expression of the inputs'. Empty: none may.
        limits: Of an input: smallest size, largest size and step of each dimension with a symbol,
            (0, 0, 0) for the others. Empty: not known.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    dynamic: tuple[str, ...] = ()
    limits: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("dynamic", "limits"):
            found = len(getattr(self, name))
            if found not in (0, len(self.shape)):
                raise ConfigError(
                    f"tensor {self.name!r}: {name} has {found} entries, wanted none or one for "
                    f"each of the {len(self.shape)} dimensions"
                )

    @property
    def carrier(self) -> str:
        """The type in which the graph and its builds take and give it: half types are float32."""
        return "float32" if self.dtype in ("float16", "bfloat16") else self.dtype

    def symbol(self, dim: int) -> str:
        """The symbol of a dimension; "" where its size is fixed, or is the batch."""
        return self.dynamic[dim] if self.dynamic else ""


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


MAX_BUCKETS = 16  # of one choice: each is compiled, and keeps weights in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Sizes that have a build of their own, and the smaller ones that are padded to them.

    Attributes:
        sizes: Symbol of the signature -> the size that is built.
        least: Symbol -> the smallest size of a call that goes to this build.

    Raises:
        ConfigError: Other symbols in one than in the other, or not 1 <= least <= size.
    """

    sizes: Mapping[str, int]
    least: Mapping[str, int]

    def __post_init__(self) -> None:
        fits = self.sizes.keys() == self.least.keys() and len(self.sizes) > 0
        if not fits or any(not 1 <= self.least[s] <= size for s, size in self.sizes.items()):
            raise ConfigError(
                f"bucket: found sizes {dict(self.sizes)} and least {dict(self.least)}, wanted "
                "the same symbols in both and 1 <= least <= size for each"
            )

    @property
    def pads(self) -> bool:
        """Whether any size but the built one goes there."""
        return any(self.least[s] < size for s, size in self.sizes.items())

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call of these sizes goes there."""
        return all(low <= sizes[s] <= self.sizes[s] for s, low in self.least.items())

    def describe(self) -> str:
        """The built sizes, in the order of their symbols' names: 224x320."""
        return "x".join(str(size) for _, size in sorted(self.sizes.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildChoice:
    """What a backend may decide for a whole build.

    Attributes:
        shapes: How sizes that differ from call to call are built.
        buckets: Of "exact" and "padded": the sizes that have a build; a call goes to the first
            that takes it, else to the open build.

    Raises:
        ConfigError: Fewer than one thread or sample, or buckets that do not fit ``shapes``.
    """

    backend: str
    device: str = "cpu"
    precision: Precision = "f32"
    threads: int = 1
    batch: int = 1
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    shapes: ShapeMode = "open"
    buckets: tuple[Bucket, ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads: found {self.threads}, wanted at least 1")
        if self.batch < 1:
            raise ConfigError(f"batch: found {self.batch}, wanted at least 1")
        wanted = "no bucket" if self.shapes == "open" else f"1 to {MAX_BUCKETS} buckets"
        if (self.shapes == "open") != (not self.buckets) or len(self.buckets) > MAX_BUCKETS:
            raise ConfigError(f"shapes={self.shapes}: found {len(self.buckets)}, wanted {wanted}")
        if self.shapes == "exact" and any(b.pads for b in self.buckets):
            raise ConfigError("shapes=exact: found a bucket that pads, wanted least == sizes")

    @property
    def rounds(self) -> bool:
        """Whether sums are taken of values with fewer bits than float32 has."""
        return self.precision != "f32" or bool(self.options.get("tf32"))

    def describe(self) -> str:
        """One short line for a table."""
        extra = "".join(f" {k}={v}" for k, v in sorted(self.options.items()))
        sizes = " | ".join(b.describe() for b in self.buckets)
        shapes = f", {_SHAPE_WORDS[self.shapes]} {sizes}" if sizes else ""
        return f"{self.backend} {self.precision}, {self.threads} thread(s){extra}{shapes}"


_SHAPE_WORDS: Mapping[ShapeMode, str] = {"open": "", "exact": "exact at", "padded": "padded to"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatInfo:
    """A number format that a backend runs; weight codes lie in [-weight_limit, weight_limit]."""

    name: Format
    weight_limit: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatChoice:
    """A way to build floats.

    Attributes:
        quick: Options in place of those of the same names where dozens of builds are needed, as for prices;
            empty where such a build takes no longer than others.
    """

    precision: Precision
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    quick: Mapping[str, str | int | bool] = field(default_factory=dict)


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
    # More of them, where weights may be stored in few bits.
    stored_choices: tuple[Mapping[str, str | int | bool], ...] = ()
    # Uncompressed builds worth measuring, where options decide how floats are computed, too.
    floats: tuple[FloatChoice, ...] = ()

    def format(self, name: Format) -> FormatInfo | None:
        """The format of that name, or None where the backend has none."""
        return next((f for f in self.formats if f.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Whether a backend runs a candidate, and if not, why."""

    ok: bool
    reason: str = ""


OUTSIDE = "outside"  # in profiles: what a call takes beside all its nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One choice.

    Kind ``format``: the number format of the ops that use one weight, or of what an addition reads
    (``op_kind`` add, no weight), or the function of an activation (``op_kind`` activation). Kind ``width``: how many
    units of one width are kept; ``members`` names the coupled parameters. Kind ``branch``: a
    residual branch or a whole block; level ``units`` (2) kept, 1 the best linear map, 0 its mean.
    """

    name: str  # format: module path of the first op; width: WIDTH_PREFIX and its first producer
    kind: SiteKind
    ops: tuple[str, ...]  # graph nodes, in graph order; of a width those that read it
    op_kind: Literal["linear", "conv", "embedding", "add", "activation", ""] = ""
    weight: str = ""  # the parameter's name
    shape: tuple[int, ...] = ()  # of the weight
    groups: int = 1
    units: int = 0  # of a width; of a branch its highest level
    unit_kind: WidthKind | Literal[""] = ""
    exactness: Exactness | Literal[""] = ""
    members: tuple[str, ...] = ()  # parameters coupled by a width
    tensor: str | None = None  # the graph node that the ops read; its readers share a quantiser
    macs: int = 0  # per sample
    size_bytes: int = 0  # of weight and bias as given
    pinned: str | None = None  # why it stays as it is

    @property
    def has_weight(self) -> bool:
        """Whether it is the format of a layer's weight."""
        return self.kind == "format" and self.op_kind not in ("add", "activation")

    @property
    def width(self) -> str:
        """The name of the width behind a width site."""
        return self.name.removeprefix(WIDTH_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One level of a site: the bytes it takes and the error it causes alone."""

    site: str
    level: Level
    method: str
    size_bytes: int
    error: float = 0.0  # change of the output in its own geometry, mean over samples
    error_se: float = 0.0  # standard error of that mean
    samples: int = 0  # that the error was measured on; 0: it was not measured
    proxy: float | None = None  # what one layer's own error and the output's gradient predict
    note: str = ""  # why it was measured on few samples
    detail: Mapping[str, Any] = field(default_factory=dict)  # the method's own settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency of one callable: median of all runs, and a 95 % interval of that median."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds_ms: tuple[float, ...]  # median of each round, in order: the interleaved comparison
    runs: int
    dropped: int = 0  # runs that the system interrupted
    disturbed: int = 0  # interrupted runs that count, as more than half of their round were


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedBuild:
    """One whole build that was measured to make or to test a table."""

    assignment: Mapping[str, Level]
    measured_ms: float
    predicted_ms: float
    held_out: bool  # no fit saw it


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A cost that depends on the levels of some sites, one value a combination.

    An op that two widths meet costs what (input level, output level, format) costs; the bytes of
    its weight are a term of the same sites.

    Attributes:
        name: The op or weight that costs it.
        sites: The sites whose levels decide; at least one, each once. Of several formats the
            first is the op's own.
        levels: The levels of each site, each once.
        values: One cost a combination, the last site's levels running fastest.

    Raises:
        ConfigError: Sites, levels and values do not fit each other.
    """

    name: str
    sites: tuple[str, ...]
    levels: tuple[tuple[Level, ...], ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        distinct = len(set(self.sites)) == len(self.sites) > 0
        if not distinct or len(self.levels) != len(self.sites):
            raise ConfigError(
                f"{self.name}: found the sites {list(self.sites)} with {len(self.levels)} lists of "
                "levels, wanted at least one site, each once, and a list for each"
            )
        if any(len(set(row)) != len(row) for row in self.levels):
            raise ConfigError(f"{self.name}: a level is listed twice in {self.levels}")
        wanted = math.prod(len(row) for row in self.levels)
        if len(self.values) != wanted:
            raise ConfigError(
                f"{self.name}: found {len(self.values)} values, wanted {wanted}, one a combination "
                f"of the levels of {', '.join(self.sites)}"
            )
        if not all(map(math.isfinite, self.values)):
            raise ConfigError(f"{self.name}: found a value that is not finite")

    def is_eight_bit(self, assignment: Mapping[str, Level]) -> bool:
        """Whether the op itself is in 8 bits: of several formats the first is its own."""
        formats = (v for s in self.sites if isinstance(v := assignment[s], str))
        return is_eight_bit(next(formats, None))

    def at(self, assignment: Mapping[str, Level]) -> float:
        """The cost under an assignment that names all the sites.

        Raises:
            ConfigError: A site at a level that the term does not know.
        """
        index = 0
        for site, levels in zip(self.sites, self.levels, strict=True):
            level = assignment.get(site)
            if level not in levels:
                raise ConfigError(
                    f"{self.name}: site {site} at level {level!r} has no price; there are "
                    f"{', '.join(map(str, levels))}"
                )
            index = index * len(levels) + levels.index(level)
        return self.values[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """How far predictions of a price table may be off, as shares of what is predicted.

    Attributes:
        deviation: Standard deviation of the error on a build whose parts are well known.
        covariance: What is not known of the parts of a price, by ``PriceTable.parts``; it adds to
            the square of ``deviation`` by the shares of a build's parts.
        entries: Entry of ``ops`` or name of a term -> standard deviation of what it costs in one
            build.
    """

    deviation: float
    covariance: tuple[tuple[float, ...], ...]
    entries: Mapping[str, float] = field(default_factory=dict)

    def share(self, parts: tuple[float, ...]) -> float:
        """Standard error of a prediction of some parts, as a share of their sum."""
        total = sum(parts)
        shares = [part / total for part in parts]
        rows = [sum(c * s for c, s in zip(row, shares, strict=True)) for row in self.covariance]
        return math.sqrt(self.deviation**2 + sum(r * s for r, s in zip(rows, shares, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """What a plan costs on one build choice: sum of the entries, times ``scale``.

    Attributes:
        ops: Format sites that no width meets -> format -> ms.
        terms: What depends on widths, formats of those ops included.
        native: Width or branch -> its level when left alone: the full count. Format sites are
            left alone in the precision of ``choice``.
        uncertainty: Of what is predicted; None where too few builds show it.

    Raises:
        ConfigError: A term that has no price for its sites left alone.
    """

    choice: BuildChoice
    ops: Mapping[str, Mapping[str, float]]  # site -> format -> ms
    quantizers: Mapping[str, float]  # tensor -> ms, paid once if any reader is int8
    glue_ms: float
    scale: float = 1.0
    builds: tuple[PricedBuild, ...] = ()
    corrections: int = 0  # how often measured finalists moved the scale
    terms: tuple[Term, ...] = ()
    native: Mapping[str, int] = field(default_factory=dict)
    uncertainty: Uncertainty | None = None

    def __post_init__(self) -> None:
        for term in self.terms:
            for site, levels in zip(term.sites, term.levels, strict=True):
                if self.native_level(site) not in levels:
                    raise ConfigError(
                        f"{term.name}: site {site} left alone is at "
                        f"{self.native_level(site)!r}, which has no price among "
                        f"{', '.join(map(str, levels))}; price that level too, and list the full "
                        "count of a width in native"
                    )

    def native_level(self, site: str) -> Level:
        """The level of a site that is left alone."""
        return self.native.get(site, self.choice.precision)

    def complete(self, assignment: Mapping[str, Level]) -> dict[str, Level]:
        """An assignment by what its levels cost, with the sites of the terms that it does not list.

        Those are left alone; stored formats go by the one that has their price.
        """
        sites = (site for term in self.terms for site in term.sites)
        priced = {site: priced_as(level) for site, level in assignment.items()}
        return {**{site: self.native_level(site) for site in sites}, **priced}

    def predict_ms(self, assignment: Mapping[str, Level], tensors: Mapping[str, str]) -> float:
        """Predicted latency; ``tensors`` names the tensor that each site reads.

        Sites that are not listed are left alone.

        Raises:
            ConfigError: A site at a level that one of its terms has no price for.
        """
        native = self.choice.precision
        total = self.glue_ms
        for site, row in self.ops.items():
            total += row.get(str(priced_as(assignment.get(site, native))), row.get(native, 0.0))
        int8 = {
            tensors[s] for s, level in assignment.items() if is_eight_bit(level) and s in tensors
        }
        total += sum(self.quantizers.get(t, 0.0) for t in sorted(int8))
        if self.terms:
            levels = self.complete(assignment)
            total += sum(term.at(levels) for term in self.terms)
        return total * self.scale

    def predict_se_ms(
        self, assignment: Mapping[str, Level], tensors: Mapping[str, str]
    ) -> float | None:
        """Standard error of ``predict_ms``; None where it is not known."""
        if self.uncertainty is None:
            return None
        parts = self.parts(assignment, tensors)
        return sum(parts) * self.uncertainty.share(parts)

    def parts(
        self, assignment: Mapping[str, Level], tensors: Mapping[str, str]
    ) -> tuple[float, float, float, float]:
        """What ``predict_ms`` adds up: native entries, int8 ones, quantisers, constant glue."""
        native = int8 = 0.0
        for site, row in self.ops.items():
            level = str(priced_as(assignment.get(site, self.choice.precision)))
            ms = row.get(level, row.get(self.choice.precision, 0.0))
            native, int8 = (native, int8 + ms) if is_eight_bit(level) else (native + ms, int8)
        levels = self.complete(assignment)
        for term in self.terms:
            ms, rounds = term.at(levels), term.is_eight_bit(levels)
            native, int8 = (native, int8 + ms) if rounds else (native + ms, int8)
        chosen = {
            tensors[s] for s, level in assignment.items() if is_eight_bit(level) and s in tensors
        }
        quantizers = sum(self.quantizers.get(t, 0.0) for t in sorted(chosen))
        found = (native, int8, quantizers, self.glue_ms)
        return tuple(ms * self.scale for ms in found)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRow:
    """One uncompressed build, measured beside the others."""

    name: str
    choice: BuildChoice | None  # None: the model as given, eager
    timing: Timing
    size_bytes: int
    agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A level that was on offer, and why no plan may take it."""

    site: str
    level: Level
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The uncompressed builds and a table for each build choice that stays in the race."""

    machine: str  # fingerprint
    baselines: tuple[BaselineRow, ...]
    best: int  # index into baselines: the reference of every speed
    tables: tuple[PriceTable, ...]
    seconds: float = 0.0
    size_terms: tuple[Term, ...] = ()  # bytes that depend on the levels of several sites
    refused: tuple[Refusal, ...] = ()  # levels that no plan may take

    @property
    def baseline(self) -> BaselineRow:
        """The best uncompressed build."""
        return self.baselines[self.best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One level a site, on one build choice; readable, editable and replayable."""

    assignment: Mapping[str, Level]  # sites that are not listed stay in the choice's precision
    choice: BuildChoice
    predicted_ms: float
    predicted_bytes: int
    predicted_error: float
    target: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # site -> detail
    methods: Mapping[str, str] = field(
        default_factory=dict
    )  # changed site -> where its level is from
    binding: str = ""  # the constraint that stopped it
    seed: int = 0
    model: str = ""  # content hash of the captured graph
    measured_ms: float | None = None
    measured_error: float | None = None
    predicted_ms_se: float | None = None  # standard error of predicted_ms; None: not known

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
    noise: float = 0.0  # relative spread, from round to round, of the ratio of the latencies
    notes: tuple[str, ...] = ()
