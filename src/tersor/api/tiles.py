"""The tiles of this machine: measured once for each backend and format, and kept.

The probe is what a width is: the output of one op and the input of the next. One graph holds such a
pair of linears and a pair of 3x3 convolutions for each of some thirty sizes, so that one call runs all
sizes within milliseconds of each other; its profile gives the time of each node. Every profile compiles
anew, as a moment's memory layout must look like no step.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.errors import TersorError
from tersor.core.jsonable import digest
from tersor.core.machine import describe_machine
from tersor.core.progress import Progress
from tersor.core.records import BackendInfo, BuildChoice, Format, Precision, Site, WidthKind
from tersor.core.store import Store
from tersor.graph.apply import apply
from tersor.graph.contracts import Backend, Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute
from tersor.ops.grids import round_nearest
from tersor.price.grid import DEFAULT_TILES, Tile, discover_tile, tile_for

SIZES = tuple(range(36, 137, 4))  # two tiles of 64, a size at half of the least tile
SWEEPS = 4
_PROTOCOL = 1  # to be raised where probes or the rule change
_TOKENS, _FEATURES = 256, 128  # of the linears
_PLANE, _CHANNELS = 14, 32  # of the convolutions
_STEP = 2.0**-5  # of the probes' activations: times do not depend on it
_KINDS = ("linear", "conv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tiles by the kind of op, one a backend.

    Attributes:
        native: Of the best native precision.
        int8: Of int8, of the backends that run it.
    """

    native: Mapping[str, tuple[int, ...]]
    int8: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def step(self, units: int, unit_size: int, kind: WidthKind | str) -> int:
        """The tile for the kept counts of a width of some kind."""
        op = "conv" if kind == "channels" else "linear"
        return tile_for(units, unit_size, self.native[op], self.int8.get(op, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is kept of one backend and format."""

    tiles: Mapping[str, Tile]  # by kind of op


def device_tiles(
    backends: Mapping[str, Backend],
    infos: Sequence[BackendInfo],
    store: Store,
    progress: Progress,
) -> Tiles:
    """The tiles of this machine's backends, measured where the store does not know them."""
    best: Precision = "bf16" if any("bf16" in info.precisions for info in infos) else "f32"
    native = [(info, best) for info in infos if best in info.precisions]
    int8: list[tuple[BackendInfo, Format]] = [(i, "int8") for i in infos if i.format("int8")]

    def by_kind(wanted: Sequence[tuple[BackendInfo, Format]]) -> dict[str, tuple[int, ...]]:
        rows = [_kept(backends[i.name], i, level, (store, progress)) for i, level in wanted]
        return {kind: tuple(row[kind] for row in rows) for kind in _KINDS} if rows else {}

    return Tiles(native=by_kind(native), int8=by_kind(int8))


def _kept(
    backend: Backend, info: BackendInfo, level: Format, kept: tuple[Store, Progress]
) -> dict[str, int]:
    store, progress = kept
    machine = describe_machine().fingerprint()
    key = digest(_PROTOCOL, machine, info.name, info.version, info.device, level)
    found = store.get(_Found, "tiles", key)
    if found is None:
        progress.stage("tiles", SWEEPS)
        try:
            found = _Found(tiles=_measured(backend, info, level, progress))
        except TersorError as error:  # nothing is kept, so that the next run tries again
            progress.note(f"{info.name} {level}: tiles were not measured: {error}")
            return dict.fromkeys(_KINDS, DEFAULT_TILES[level])
        store.put("tiles", key, found)
        for kind, tile in found.tiles.items():
            how = "measured" if tile.is_believed else "no steps show, so that this is the default"
            progress.note(f"{info.name} {level} {kind}: tiles of {tile.tile} ({how})")
    return {kind: found.tiles[kind].tile for kind in _KINDS}


def _measured(
    backend: Backend, info: BackendInfo, level: Format, progress: Progress
) -> dict[str, Tile]:
    graph, nodes = probe_graph(level, info)
    precision: Precision = "bf16" if level == "bf16" else "f32"
    choice = BuildChoice(
        backend=info.name,
        device=info.device,
        precision=precision,
        options=dict(info.choices[0]) if info.choices else {},
    )
    build = backend.build(graph, shapes_of(graph.signature, 1), choice)
    names = [spec.name for spec in graph.signature.inputs]
    build.run({name: t[:1].numpy() for name, t in zip(names, graph.example, strict=True)})
    profiles: list[Mapping[str, float]] = []
    for _ in range(SWEEPS):
        profiles.append(build.profile())
        progress.advance()
    return {
        kind: discover_tile(
            SIZES,
            [[sum(p.get(n, 0.0) for n in nodes[kind, size]) for size in SIZES] for p in profiles],
            DEFAULT_TILES[level],
        )
        for kind in _KINDS
    }


class _Probe(nn.Module):
    """For each size a pair of linears and a pair of convolutions, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.ModuleList(), nn.ModuleList()
        for n in SIZES:
            pair = nn.Linear(_FEATURES, n), nn.ReLU(), nn.Linear(n, _FEATURES)
            self.linear.append(nn.Sequential(*pair))
            first = nn.Conv2d(_CHANNELS, n, 3, padding=1)
            last = nn.Conv2d(n, _CHANNELS, 3, padding=1)
            self.conv.append(nn.Sequential(first, nn.ReLU(), last))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 16

    def forward(self, x: Tensor, plane: Tensor) -> list[Tensor]:
        return [*(f(x) for f in self.linear), *(f(plane) for f in self.conv)]


def probe_graph(
    level: Format, info: BackendInfo
) -> tuple[Graph, dict[tuple[str, int], tuple[str, ...]]]:
    """All probes in one graph, and the nodes of each by kind of op and size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, _TOKENS, _FEATURES, generator=generator)
    plane = torch.randn(2, _CHANNELS, _PLANE, _PLANE, generator=generator)
    call, tensors = flatten_item((x, plane), "the probes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = capture(_Probe().eval(), Samples(call, tensors)).graph
    sites = find_sites(graph)
    nodes: dict[tuple[str, int], tuple[str, ...]] = {}
    for site in sites:
        kind, index = site.name.split(".")[:2]
        place = kind, SIZES[int(index)]
        nodes[place] = (*nodes.get(place, ()), *site.ops)
    int8 = info.format("int8")
    if level == "int8" and int8 is not None:
        quantizers: dict[str | None, Quantizer] = {}
        changes = [
            rounded(graph, site, int8.weight_limit, quantizers, after=site.name.endswith(".2"))
            for site in sites
        ]
        graph = apply(graph, changes)
    return graph, nodes


def rounded(
    graph: Graph,
    site: Site,
    limit: int,
    quantizers: dict[str | None, Quantizer],
    *,
    after: bool,
) -> SiteChange:
    """The simplest int8 change; all readers of a tensor share its quantiser.

    ``after``: the tensor comes out of a ReLU.
    """
    grid = Quantizer(step=_STEP, low=0 if after else -128, high=255 if after else 127)
    weight = attribute(graph.module, site.weight).detach().double()
    rows = weight.reshape(1, weight.shape[0], -1)
    step = (rows.abs().amax(2) / limit).clamp(min=1e-12)
    return SiteChange(
        site=site,
        level="int8",
        codes=round_nearest(rows, step, limit).reshape(weight.shape),
        scale=step.reshape(-1).float(),
        quantizer=quantizers.setdefault(site.tensor, grid),
    )
