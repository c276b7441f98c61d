"""What one run works on: the captured model, the data, the backend, the store and the settings."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor._version import __version__
from tersor.analyse.activations import activation_sites
from tersor.analyse.additions import addition_sites
from tersor.analyse.branches import branch_sites, sites_inside
from tersor.analyse.sites import find_sites
from tersor.analyse.widths import unit_size, width_sites
from tersor.api.agreeing import Beating, agree
from tersor.api.taught import Taught, read_taught
from tersor.api.tiles import Tiles, device_tiles
from tersor.artifact.manifest import Ranges
from tersor.build.reference import GraphExecutable
from tersor.capture.detector import Detector, Intake, split_detector
from tersor.capture.module import Captured, capture
from tersor.capture.outputs import output_kind, require_samples
from tersor.capture.programs import Model, open_model
from tersor.capture.samples import Samples, as_carried, collect, varying
from tersor.core import registry
from tersor.core.data import Data, Metric, Split, as_data
from tersor.core.errors import BackendError, ConfigError
from tersor.core.jsonable import digest
from tersor.core.levels import Inside
from tersor.core.machine import describe_machine
from tersor.core.progress import Printed, Progress, Silent
from tersor.core.records import BackendInfo, OutputKind, Site
from tersor.core.recovery import Recover
from tersor.core.store import Store
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.heads import Heads
from tersor.graph.contracts import Backend, Executable, Graph, Method, kinds_of
from tersor.graph.serial import structure_text
from tersor.observe.ranks import ALONE, Parcel, RankGroup
from tersor.price.grid import kept_counts
from tersor.runtime.runner import Runner
from tersor.timing.device import InTurn, SelfTimed, call_of
from tersor.transform.prefixes import Prefixes

_REFERENCE_BATCH = 16  # of graphs that torch runs
_LEAST_SHARE = 0.002  # of the multiply-accumulates that widths reach: a smaller one saves nothing
_MOST_WIDTHS = 96  # beyond, errors and prices take longer than they are worth
_MOST_BRANCHES = 16
MIX = 8  # calls that stand for all sizes of the data, each for as many samples


_MOST_SEED = 2**62  # some are derived from it, and generators take 63 bits
_WORDS = {"keep": "patterns of layers' names", "methods": "methods' names, or 'all'"}
_SUCH = {"keep": "('encoder.*',)", "methods": "('quantize', 'prune')"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The caller's options."""

    device: str = "cpu"
    backend: str = "auto"
    batch: int = 1
    methods: str | Sequence[str] = "all"
    keep: Sequence[str] = ()
    cache_dir: str | Path | None = None
    seed: int = 0
    progress: Any = True
    metric: Any = None
    test_metric: Any = None
    recover: Recover | None = None
    for_size: bool = False  # bytes have a budget, so that what saves only bytes is offered, too
    made_by: Mapping[str, str] = field(
        default_factory=dict
    )  # of a plan that is replayed: its methods

    def __post_init__(self) -> None:
        if type(self.batch) is not int or self.batch < 1:
            raise ConfigError(f"batch: found {self.batch!r}, wanted a whole number of at least 1")
        if type(self.seed) is not int or not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(
                f"seed: found {self.seed!r}, wanted a whole number from 0 to {_MOST_SEED}"
            )
        if self.recover is not None and not isinstance(self.recover, Recover):
            raise ConfigError(
                f"recover: found {type(self.recover).__name__}, wanted tersor.Recover(seconds=...) "
                "or None"
            )
        _check_names(self.keep, self.methods)
        for name in ("metric", "test_metric"):
            value = getattr(self, name)
            if value is not None and not callable(value) and not isinstance(value, Metric):
                raise ConfigError(
                    f"{name}: found {type(value).__name__}, wanted a callable that takes predict "
                    "and returns a number, or tersor.Metric"
                )

    def options(self) -> dict[str, Any]:
        """Those that are plain values, by name; where files and lines go is not among them."""
        apart = ("cache_dir", "progress", "metric", "test_metric")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}


@dataclass(frozen=True, kw_only=True)
class Session:
    """One model with its data on the backends that may run it.

    Attributes:
        backends: By name; each choice of a build names one.
        infos: What they can do here, in the order of their names.
    """

    captured: Captured
    parts: Mapping[Split, Samples]
    kind: OutputKind
    sites: tuple[Site, ...]
    methods: Mapping[str, Method]
    backends: Mapping[str, Backend]
    infos: tuple[BackendInfo, ...]
    store: Store
    progress: Progress
    settings: Settings
    original_bytes: int
    model_hash: str
    key: str  # of everything that the stages before the target read
    axes: Axes | None = None  # where a method may cut widths
    inside: Inside = field(default_factory=dict)  # branch -> sites that go with it
    bases: dict[str, tuple[Graph, Axes]] = field(default_factory=dict)  # without some branches
    scores: dict[str, float] = field(default_factory=dict)  # of the original, by metric
    answers: dict[str, list[Tensor]] = field(default_factory=dict)  # its classes, by metric
    ranges: dict[str, Ranges] = field(default_factory=dict)  # of the original: one, once known
    fits: dict[str, Graph] = field(default_factory=dict)  # graphs of cut widths, lightly fitted
    prefixes: Prefixes = field(default_factory=Prefixes)  # where those fits may begin
    heads: dict[str, Heads | None] = field(default_factory=dict)  # width -> how its heads lie
    detector: Detector | None = None  # whose core the captured model is
    ranks: RankGroup = ALONE  # who shares the work
    drawn: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)  # examples
    taught: Taught | None = None  # the caller's own data for recovery

    @property
    def graph(self) -> Graph:
        """The captured graph."""
        return self.captured.graph

    @property
    def site_by_name(self) -> dict[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.sites}

    @property
    def formats(self) -> tuple[Site, ...]:
        """The sites of layers."""
        return tuple(s for s in self.sites if s.has_weight)

    @property
    def additions(self) -> tuple[Site, ...]:
        """The sites of additions."""
        return tuple(site for site in self.sites if site.op_kind == "add")

    @property
    def activations(self) -> tuple[Site, ...]:
        """The sites of activations."""
        return tuple(site for site in self.sites if site.op_kind == "activation")

    @property
    def widths(self) -> tuple[Site, ...]:
        """The sites of widths."""
        return tuple(site for site in self.sites if site.kind == "width")

    @property
    def branches(self) -> tuple[Site, ...]:
        """The sites of residual branches."""
        return tuple(site for site in self.sites if site.kind == "branch")

    @property
    def tensors(self) -> dict[str, str]:
        """Site -> the tensor that it reads."""
        return {s.name: s.tensor for s in self.sites if s.tensor is not None}

    def flat(self, part: Split, limit: int | None = None) -> tuple[Tensor, ...]:
        """Flat inputs of a part, of its largest shape."""
        return tuple(t[:limit] for t in self.parts[part].tensors)

    def examples(self, batch: int, mix: int = MIX) -> list[dict[str, Any]]:
        """Named arrays for one call at a batch size, from real samples.

        One, or ``mix`` where sizes vary: at the middles of as many equal shares of the samples by
        size, the largest first.
        """
        if (batch, mix) not in self.drawn:
            samples = self.parts["calibration"]
            drawn = samples.drawn(mix if samples.others else 1, batch)
            self.drawn[batch, mix] = [self.named(flat) for flat in drawn]
        return self.drawn[batch, mix]

    def named(self, flat: Sequence[Tensor]) -> dict[str, Any]:
        """Flat inputs as arrays by name."""
        specs = self.graph.signature.inputs
        return {s.name: t.contiguous().numpy() for s, t in zip(specs, flat, strict=True)}

    def caller(self, executable: Executable, batch: int, mix: int = MIX) -> Callable[[], object]:
        """A call of a build on each of the examples."""
        examples = self.examples(batch, mix)

        calls = [call_of(executable, inputs) for inputs in examples]
        timed = [call for call in calls if isinstance(call, SelfTimed)]
        return InTurn(timed) if timed else lambda: [call() for call in calls]

    def as_given(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """A function of what was captured as one of the model as given."""
        return predict if self.detector is None else self.detector.attach(predict)

    def reference(self, graph: Graph) -> Runner:
        """A graph with the model's own calling convention, run by torch."""
        return Runner(GraphExecutable(graph), graph.signature, _REFERENCE_BATCH)


def open_session(model: Any, data: Any, settings: Settings, ranks: RankGroup = ALONE) -> Session:
    """Check everything that can be checked early, read the data, capture the model.

    Raises:
        RankError: Another rank has another model, other data or other settings.
    """
    progress = _progress(settings.progress, ranks)
    store = Store(settings.cache_dir or Path.home() / ".cache" / "tersor")
    backends, infos = pick_backends(settings.backend, settings.device)
    wanted = as_data(data)
    progress.stage("data")
    opened, detector, parts = _read(open_model(model), wanted, settings.seed)
    progress.stage("capture")
    captured = capture(opened, parts["calibration"], varying(parts.values()))
    graph = captured.graph
    parts = {name: as_carried(part, graph.signature) for name, part in parts.items()}
    model_hash = graph_hash(graph)
    agree(ranks, settings.options(), infos, lambda: _hashes(model_hash, parts))
    methods = pick_methods(settings.methods, infos, for_size=settings.for_size)
    sites, axes = offered_sites(graph, methods.values(), tuple(settings.keep))
    tiles = None
    has_widths = axes is not None and any(site.kind == "width" for site in sites)
    if has_widths or any(_takes(m, "rank_step") for m in methods.values()):
        tiles = ranks.first(
            Tiles, lambda: Parcel(device_tiles(backends, infos, store, progress)), "tiles"
        ).record
        methods = {n: with_counts(m, axes, tiles) for n, m in methods.items()}
    tensors = parts["calibration"].tensors
    ends = [graph.run([t[rows] for t in tensors]) for rows in (slice(1), slice(-1, None))]
    require_samples(graph.signature.outputs, *ends)
    outputs = graph.run([t[:8] for t in tensors])
    kind = output_kind(wanted.output, outputs)
    progress.note(
        f"{sum(s.kind == 'format' for s in sites)} layers, "
        f"{sum(s.kind == 'width' for s in sites)} widths, {sum(len(p) for p in parts.values())} samples "
        f"({', '.join(f'{len(p)} {n}' for n, p in parts.items())})"
    )
    key = digest(
        __version__,
        model_hash,
        _data_hash(parts),
        kind,
        [(info.name, info.version) for info in infos],
        settings.device,
        settings.batch,
        settings.seed,
        list(settings.keep),
        sorted(methods),
        settings.for_size,
        # Where methods share no level of a site, who made one is no choice.
        dict(settings.made_by) if any(may_share(m) for m in methods) else {},
        tiles,
        describe_machine().fingerprint(),
    )
    key = ranks.first(_Key, lambda: Parcel(_Key(key=key)), "open").record.key  # of its machine
    return Session(
        captured=captured,
        parts=parts,
        kind=kind,
        sites=sites,
        methods=methods,
        backends=backends,
        infos=infos,
        store=store,
        progress=progress,
        settings=settings,
        original_bytes=_model_bytes(opened),
        model_hash=model_hash,
        key=key,
        detector=detector,
        axes=axes,
        taught=read_taught(
            settings.recover, graph, captured.call, lambda s: _data_hash({"calibration": s})
        ),
        inside=sites_inside(graph, sites, axes),
        ranks=ranks,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    key: str


def _hashes(model_hash: str, parts: Mapping[Split, Samples]) -> dict[str, str]:
    """Of the model, and of each part of the data."""
    own = {f"{name} data": _data_hash({name: part}) for name, part in parts.items()}
    return {"model": model_hash, **own}


def _read(
    model: Model, data: Data, seed: int
) -> tuple[Model, Detector | None, dict[Split, Samples]]:
    """What is captured, the detector whose core it is, and the samples that it takes."""
    detector = split_detector(model)
    if detector is None:
        return model, None, collect(data, seed, ragged=True)
    intake = Intake(detector, data.to_inputs)
    parts = collect(replace(data, to_inputs=intake), seed, ragged=True)
    return (detector.core, detector, parts) if intake.taken else (model, None, parts)


def _progress(progress: Any, ranks: RankGroup) -> Progress:
    found: Progress = progress
    if progress is True:  # one rank's lines are enough
        found = Printed() if ranks.is_first else Silent()
    elif not progress:
        found = Silent()
    return Beating(found, ranks) if ranks.is_shared and ranks.is_first else found


def pick_backends(name: str, device: str) -> tuple[dict[str, Backend], tuple[BackendInfo, ...]]:
    """The backend of a name, or all that build for a device; measurement chooses between them.

    Raises:
        ConfigError: No backend of that name.
        BackendError: It is not available here, or not for the device.
    """
    names = backend_names() if name == "auto" else [name]
    backends: dict[str, Backend] = {}
    infos, reasons = [], []
    for candidate in names:
        backend: Backend = registry.backend(candidate, device)
        if name == "auto" and getattr(backend, "by_name", False):
            reasons.append(f"{candidate}: not tried unless it is named on {device}")
            continue
        info = backend.describe()
        if info.available and info.device == device and info.precisions:
            backends[candidate] = backend
            infos.append(info)
            continue
        reason = info.reason or f"it runs on {info.device} only"
        reasons.append(f"{candidate}: {reason}{f' ({info.remedy})' if info.remedy else ''}")
    if backends:
        return backends, tuple(infos)
    raise BackendError(
        f"no backend runs on device {device!r} here: {'; '.join(reasons)}; "
        "see what `tersor doctor` says"
    )


def backend_names() -> list[str]:
    """The backends that race where none is named."""
    return registry.names(registry.BACKENDS)


def pick_methods(
    wanted: str | Sequence[str], infos: Sequence[BackendInfo], *, for_size: bool = False
) -> dict[str, Method]:
    """Methods by name, told what the integer products of all backends can take, and what is asked.

    Raises:
        ConfigError: No method of that name.
    """
    names = [
        name for word in _names(wanted) for name in (default_methods() if word == "all" else [word])
    ]
    limits = [int8.weight_limit for info in infos if (int8 := info.format("int8"))]
    found: dict[str, Method] = {}
    for name in names:
        cls = registry.resolve(registry.METHODS, name)
        known: dict[str, Any] = {"low_bits": for_size}
        if limits:
            known["weight_limit"] = min(limits)
        if infos and all(info.format("fp8") for info in infos):
            known["fp8"] = True
        fields = getattr(cls, "__dataclass_fields__", {})
        found[name] = cls(**{k: v for k, v in known.items() if k in fields})
    return found


def may_share(name: str) -> bool:
    """Whether a method may offer levels that another one has, too; of other packages' nothing is known."""
    if not registry.is_own(registry.METHODS, name):
        return True
    return bool(getattr(registry.resolve(registry.METHODS, name), "shares_levels", False))


def default_methods() -> list[str]:
    """All methods but those that ask to be named."""
    classes = {n: registry.resolve(registry.METHODS, n) for n in registry.names(registry.METHODS)}
    return [name for name, cls in classes.items() if not getattr(cls, "by_name", False)]


def offered_sites(
    graph: Graph, methods: Iterable[Method], keep: Sequence[str]
) -> tuple[tuple[Site, ...], Axes | None]:
    """The sites that some methods work on, layers always; and the widths, where those matter."""
    kinds = {kind for method in methods for kind in kinds_of(method)}
    sites = find_sites(graph, tuple(keep))
    axes = analyse_axes(graph) if kinds & {"width", "branch"} else None
    if "addition" in kinds:
        sites += addition_sites(graph, sites)
    if "activation" in kinds:
        sites += activation_sites(graph, sites)
    if axes is not None and "width" in kinds:
        sites += offered_widths(axes, keep)
    if "branch" in kinds:
        sites += offered_branches(graph, keep)
    return sites, axes


def offered_widths(axes: Axes, keep: Sequence[str]) -> tuple[Site, ...]:
    """The exact widths that are worth a price: those that matter most, in graph order."""
    found = width_sites(axes, keep=keep)
    total = max(1, sum(site.macs for site in found))
    worth = [s for s in found if s.macs >= _LEAST_SHARE * total]
    largest = sorted(worth, key=lambda s: -s.macs)[:_MOST_WIDTHS]
    return tuple(site for site in found if site in largest)


def offered_branches(graph: Graph, keep: Sequence[str]) -> tuple[Site, ...]:
    """The branches that are worth a price: those that compute most, in graph order."""
    found = branch_sites(graph, keep)
    largest = sorted(found, key=lambda s: -s.macs)[:_MOST_BRANCHES]
    return tuple(site for site in found if site in largest)


def _takes(method: Method, name: str) -> bool:
    return name in getattr(method, "__dataclass_fields__", {})


def with_counts(method: Method, axes: Axes | None, tiles: Tiles) -> Method:
    """A method with the kept counts, or the steps of ranks, that fill whole tiles of the device."""

    def rank_step(site: Site) -> int:
        kind = "channels" if site.op_kind == "conv" else "neurons"
        return tiles.step(min(site.shape[:2]), 1, kind)

    if _takes(method, "rank_step"):
        return replace(method, rank_step=rank_step)  # type: ignore[type-var]
    if axes is None or not _takes(method, "counts"):
        return method

    def counts(site: Site) -> tuple[int, ...]:
        size = unit_size(axes, site)
        # No device pads the number of experts.
        tile = 1 if site.unit_kind == "experts" else tiles.step(site.units, size, site.unit_kind)
        found = kept_counts(site.units, size, tile)
        return tuple(n for n in found if n >= axes[site.width].least)

    return replace(method, counts=counts)  # type: ignore[type-var]


def _check_names(keep: object, methods: object) -> None:
    if isinstance(keep, str):
        raise ConfigError(f"keep: found the text {keep!r}, wanted a tuple of patterns")
    for name, value in (("keep", keep), ("methods", methods)):
        if not isinstance(value, str) and not _are_texts(value):
            raise ConfigError(
                f"{name}: found {value!r}, wanted a tuple of {_WORDS[name]}, such as {_SUCH[name]}"
            )


def _are_texts(value: object) -> bool:
    return isinstance(value, Collection) and all(isinstance(v, str) for v in value)


def _names(wanted: str | Sequence[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


def graph_hash(graph: Graph) -> str:
    """SHA-256 of the structure and of all tensors."""
    state = hashlib.sha256(structure_text(graph).encode())
    for name, tensor in sorted(graph.module.state_dict().items()):
        state.update(name.encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


def _data_hash(parts: Mapping[Split, Samples]) -> str:
    state = hashlib.sha256()
    for name in sorted(parts):
        shapes = [[list(t.shape) for t in flat] for flat in parts[name].groups]
        state.update(json.dumps([name, len(parts[name]), shapes]).encode())
        for tensor in (t for flat in parts[name].groups for t in flat):
            state.update(_bytes(tensor))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _model_bytes(model: Model) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    unique = {t.untyped_storage().data_ptr(): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in unique.values())


def metric_of(value: Any) -> Metric | None:
    """The caller's metric with its unit."""
    if value is None or isinstance(value, Metric):
        return value
    return Metric(value)
