"""Where a build spends its time, and how far each op is from what the device can do."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.analyse.roofline import Ceilings, Nodes, Profile, floor_ms, profile_rows, raised
from tersor.analyse.sites import find_sites
from tersor.api.comparing import SUFFIX
from tersor.api.files import open_graph
from tersor.api.session import Settings, open_session
from tersor.api.stages import baselines, build_for
from tersor.api.tiles import rounded
from tersor.api.verifying import drawn_inputs, flat_inputs
from tersor.artifact.file import read_artifact
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core import registry
from tersor.core.errors import BackendError, ConfigError, TersorError
from tersor.core.records import OUTSIDE, BuildChoice, Format, Precision
from tersor.graph.apply import NEW, apply
from tersor.graph.contracts import Executable, Graph, Quantizer
from tersor.graph.facts import node_facts
from tersor.graph.plain import formats_of, plain
from tersor.graph.routed import routed
from tersor.runtime.load import pick
from tersor.timing.device import call_of
from tersor.timing.protocol import Protocol, measure
from tersor.verify.memory import peak_bytes

_CALL = Protocol(rounds=5, runs=11, max_seconds=10.0)
_CHANGED = f".weight{NEW}"  # behind a layer's name whose weight is another one than the original's
_CHAIN = 2  # products, one after the other


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What ceilings are measured with: larger than any cache, and long beside a launch.

    Attributes:
        rows, side: Of the products whose rate is the ceiling; convolutions have a quarter of the rows as channels.
        copied: Millions of elements that are read and written for the other ceiling.
    """

    rows: int
    side: int
    copied: int


_PROBES: Mapping[str, _Probe] = {
    "cpu": _Probe(rows=512, side=1024, copied=16),
    "cuda": _Probe(rows=4096, side=4096, copied=64),
}


@dataclass(frozen=True, kw_only=True)
class _Opened:
    name: str
    graph: Graph
    executable: Executable
    choice: BuildChoice
    backend: Any
    flat: tuple[Tensor, ...]  # of one call


def profile_model(
    source: Any, data: Any, *, device: str, backend: str, batch: int, ceilings: bool
) -> Profile:
    """See ``tersor.profile``."""
    is_file = isinstance(source, str | Path) and str(source).endswith(SUFFIX)
    if not is_file and data is None:
        raise ConfigError("data: found none, wanted inputs: a model says nothing of its inputs")
    if is_file:
        return _profile(_from_file(Path(source), data, device), ceilings=ceilings)
    with tempfile.TemporaryDirectory() as folder:  # what is measured here is of now
        settings = Settings(
            device=device,
            backend=backend,
            batch=batch,
            cache_dir=folder,
            progress=False,
            methods=(),
        )
        session = open_session(source, data, settings)
        rows, best = baselines(session)
        choice = rows[best].choice
        assert choice is not None
        opened = _Opened(
            name=source if isinstance(source, str) else type(source).__name__,
            graph=session.graph,
            executable=build_for(session, session.graph, choice).executable,
            choice=choice,
            backend=session.backends[choice.backend],
            flat=_filled(session.flat("calibration", choice.batch), choice.batch),
        )
        return _profile(opened, ceilings=ceilings)


def _from_file(path: Path, data: Any, device: str) -> _Opened:
    artifact = read_artifact(path)
    graph = open_graph(artifact)
    choice, backend = pick(artifact, device, lambda name: registry.backend(name, device), str(path))
    loaded = backend.load(artifact.sections(choice.backend), choice)
    flat = drawn_inputs(artifact) if data is None else flat_inputs(graph, data)
    return _Opened(
        name=path.name,
        graph=graph,
        executable=routed(loaded, artifact.manifest.signature, choice),
        choice=choice,
        backend=backend,
        flat=_filled(flat, choice.batch),
    )


def _filled(flat: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """As many rows as a call has; fewer samples are repeated."""
    rows = torch.arange(batch) % len(flat[0])
    return tuple(t[rows] for t in flat)


def _profile(opened: _Opened, *, ceilings: bool) -> Profile:
    choice, executable = opened.choice, opened.executable
    names = [spec.name for spec in opened.graph.signature.inputs]
    arrays = {name: t.numpy() for name, t in zip(names, opened.flat, strict=True)}

    # On a card inputs lie there, and it tells the time: as a verdict's latency is measured.
    timing = measure({"call": call_of(executable, arrays)}, _CALL)["call"]
    peak = peak_bytes(lambda: executable.run(arrays))
    times = executable.profile()
    floats = plain(opened.graph)
    formats = formats_of(opened.graph, choice.precision)
    found = measured_ceilings(opened.backend, choice, set(formats.values())) if ceilings else None
    sites = find_sites(floats)
    nodes = Nodes(
        facts=node_facts(floats, choice.batch),
        formats=formats,
        layers={node: site.name.removesuffix(_CHANGED) for site in sites for node in site.ops},
        precision=choice.precision,
    )
    rows = profile_rows(times, timing.median_ms, nodes, found)
    if found is not None:
        found = raised(found, rows)
        rows = profile_rows(times, timing.median_ms, nodes, found)
    total = sum(times.values()) or 1.0
    return Profile(
        name=opened.name,
        build=choice.describe(),
        call=timing,
        rows=rows,
        outside_ms=times.get(OUTSIDE, 0.0) / total * timing.median_ms,
        floor_ms=None if found is None else floor_ms(rows),
        ceilings=found,
        weight_bytes=opened.graph.parameter_bytes(),
        peak_bytes=peak,
    )


def measured_ceilings(backend: Any, choice: BuildChoice, formats: set[Format]) -> Ceilings:
    """Rates of large products in each format and of a large copy, through the same backend.

    With the build's own threads and precision. What can't be built has no ceiling.
    """
    found: dict[str, float] = {}
    for level in sorted({*formats, choice.precision}):
        rate = _tried(lambda level=level: _product_rate(backend, choice, level))  # type: ignore[misc]
        if rate is not None:
            found[str(level)] = rate
    return Ceilings(macs_per_s=found, bytes_per_s=_tried(lambda: _copy_rate(backend, choice)))


def _tried(action: Callable[[], float]) -> float | None:
    try:
        return action()
    except TersorError:
        return None


def _captured(module: nn.Module, x: Tensor) -> Graph:
    call, tensors = flatten_item(x, "the probe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return capture(module.eval(), Samples(call, tensors)).graph


def _product_rate(backend: Any, choice: BuildChoice, level: Format) -> float:
    probe = _PROBES[choice.device.partition(":")[0]]
    graph = _captured(_Products(probe), torch.randn(2, probe.rows, probe.side))
    sites = find_sites(graph)
    if level == "int8":
        info = backend.describe().format("int8")
        if info is None:
            raise BackendError(f"{choice.backend} does not run int8")
        grids: dict[str | None, Quantizer] = {}
        changes = [rounded(graph, s, info.weight_limit, grids, after=False) for s in sites]
        graph = apply(graph, changes)
    precision: Precision = choice.precision if level == "int8" else level  # type: ignore[assignment]
    own = replace(choice, batch=1, precision=precision, buckets=())
    build = backend.build(graph, shapes_of(graph.signature, 1), own)
    times = _node_times(build, graph)
    nodes = [node for site in sites for node in site.ops]
    facts = node_facts(plain(graph), 1)
    rates = [facts[n].macs / times[n] * 1e3 for n in nodes if times.get(n, 0.0) > 0]
    if not rates:
        raise BackendError(f"{choice.backend}: the profile of the probe shows none of its ops")
    return max(rates)


class _Products(nn.Module):
    """Large linear layers one after the other, and 3x3 convolutions of the same input."""

    def __init__(self, probe: _Probe) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(probe.side, probe.side) for _ in range(_CHAIN))
        self.channels = probe.rows // 4
        self.convs = nn.ModuleList(
            nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in range(_CHAIN)
        )
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 32

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        plane = x[:, : self.channels].reshape(x.shape[0], self.channels, 32, x.shape[2] // 32)
        for linear, conv in zip(self.linears, self.convs, strict=True):
            x, plane = linear(x), conv(plane)
        return x, plane


class _Copy(nn.Module):
    """Reads a tensor and writes one of its size."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1.0


def _copy_rate(backend: Any, choice: BuildChoice) -> float:
    probe = _PROBES[choice.device.partition(":")[0]]
    shape = (probe.copied, 1 << 20)
    graph = _captured(_Copy(), torch.zeros(2, *shape))
    # f32, whose bytes are counted below; its own options say how 16 bits or images are computed.
    ways = [w.options for w in backend.describe().floats if w.precision == "f32"]
    own = replace(
        choice, batch=1, precision="f32", buckets=(), options=ways[0] if ways else choice.options
    )
    build = backend.build(graph, shapes_of(graph.signature, 1), own)
    times = _node_times(build, graph)
    spent = sum(ms for name, ms in times.items() if name != OUTSIDE)
    return 2 * 4 * shape[0] * shape[1] / (spent / 1e3)


def _node_times(build: Executable, graph: Graph) -> Mapping[str, float]:
    names = [spec.name for spec in graph.signature.inputs]
    build.run({name: t[:1].numpy() for name, t in zip(names, graph.example, strict=True)})
    return build.profile()
